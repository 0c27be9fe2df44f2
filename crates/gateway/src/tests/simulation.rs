//! Seeded lives of a cluster, in simulated time: arrivals, lengths, workers that go and come back,
//! clients that give up. The real fleet and its lines over workers that are only links.
//!
//! `TERCET_SEED` replays one seed.

use std::collections::{BinaryHeap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tercet_cluster::Registration;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::bench::{Bench, PATIENCE, record};
use super::fake::FakeWorker;
use crate::fleet::{NoPlace, Patience};
use crate::policy::hash::{join, section};
use crate::{Config, Offer, Routing};

/// Draws that follow from a seed.
struct Dice {
    seed: u64,
    rolls: u64,
}

impl Dice {
    fn new(seed: u64) -> Self {
        Self { seed, rolls: 0 }
    }

    /// Draws a number of 0 to 1.
    fn fraction(&mut self) -> f64 {
        self.rolls += 1;
        section(join(self.seed, self.rolls))
    }

    fn once_in(&mut self, times: f64) -> bool {
        self.fraction() * times < 1.0
    }

    /// Draws the time to the next of events that come so often on average.
    fn gap(&mut self, mean: f64) -> f64 {
        -(1.0 - self.fraction()).ln() * mean
    }

    /// Draws a length with a heavy tail, in milliseconds: a bounded Pareto distribution.
    fn length(&mut self) -> u64 {
        whole(SHORTEST * (1.0 - self.fraction()).powf(-1.0 / TAIL)).min(LONGEST)
    }
}

const SHORTEST: f64 = 40.0;
const TAIL: f64 = 1.4;
const LONGEST: u64 = 10_000;

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small and positive")]
fn whole(number: f64) -> u64 {
    number.round() as u64
}

/// A request as it will come, in milliseconds.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    at: u64,
    length: u64,
    session: u64,
    /// When the client gives up waiting.
    gives_up: Option<u64>,
}

/// Returns arrivals that keep that many slots so busy.
fn arrivals(dice: &mut Dice, count: usize, slots: u32, load: f64, gives_up: bool) -> Vec<Arrival> {
    let lengths: Vec<u64> = (0..count).map(|_| dice.length()).collect();
    // Of these very lengths: what is drawn from a heavy tail is rarely as long as expected.
    let mean = lengths.iter().sum::<u64>() as f64 / count as f64;
    let mut now = 0.0;
    let mut arrival = |length| {
        now += dice.gap(mean / (f64::from(slots) * load));
        let gives_up = (gives_up && dice.once_in(20.0)).then(|| whole(dice.gap(100.0)));
        let session = whole(dice.fraction() * 50.0);
        Arrival { at: whole(now), length, session, gives_up }
    };
    lengths.into_iter().map(&mut arrival).collect()
}

/// Returns the waits at one central queue before all slots, in milliseconds.
fn ideal(arrivals: &[Arrival], slots: u32) -> Vec<u64> {
    let mut free: BinaryHeap<_> = (0..slots).map(|_| std::cmp::Reverse(0)).collect();
    let mut wait = |arrival: &Arrival| {
        let std::cmp::Reverse(slot) = free.pop().expect("there are slots");
        let begin = arrival.at.max(slot);
        free.push(std::cmp::Reverse(begin + arrival.length));
        begin - arrival.at
    };
    arrivals.iter().map(&mut wait).collect()
}

fn p99(waits: &[u64]) -> u64 {
    let mut sorted = waits.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() * 99 / 100]
}

/// What is known of the simulated cluster, and may not be otherwise.
#[derive(Debug, Default)]
struct Ledger {
    /// Streams by worker and incarnation.
    streams: HashMap<(String, u64), u32>,
    /// Numbers of the new requests in line.
    waiting: std::collections::BTreeSet<u64>,
    /// Streams that lost their worker and wait for another.
    moved: usize,
    waits: Vec<u64>,
    refused: usize,
    gave_up: usize,
    moves: usize,
}

/// A worker that comes and goes.
struct Host {
    _worker: Arc<FakeWorker>,
    registration: Option<Registration>,
    epoch: u64,
}

struct World {
    seed: u64,
    bench: Bench,
    slots: u32,
    ledger: Mutex<Ledger>,
    /// Ends with an incarnation, by worker.
    ends: Mutex<HashMap<String, (u64, CancellationToken)>>,
}

impl World {
    async fn new(seed: u64, config: Config, workers: usize, slots: u32) -> (Arc<Self>, Vec<Host>) {
        let bench = Bench::new(config);
        let ledger = Mutex::default();
        let world = Self { seed, bench, slots, ledger, ends: Mutex::default() };
        let mut hosts = Vec::new();
        for nth in 0..workers {
            let worker = FakeWorker::start();
            let id = format!("w{nth}").parse().unwrap();
            world.bench.wires.0.lock().unwrap().insert(id, worker.wire.clone());
            let mut host = Host { _worker: worker, registration: None, epoch: 0 };
            world.raise(nth, &mut host).await;
            hosts.push(host);
        }
        // Their links learn that they send no reports.
        sleep(Duration::from_secs(5)).await;
        (Arc::new(world), hosts)
    }

    /// Starts a worker's next incarnation.
    async fn raise(&self, nth: usize, host: &mut Host) {
        host.epoch += 1;
        let mut record = record(&format!("w{nth}"), &["demo"]);
        (record.max_sequences, record.epoch) = (self.slots, host.epoch);
        let id = record.id.to_string();
        let end = (host.epoch, CancellationToken::new());
        self.ends.lock().unwrap().insert(id, end);
        host.registration = Some(self.bench.register(record).await);
    }

    /// Kills a worker: its streams break.
    async fn kill(&self, nth: usize, host: &mut Host) {
        let Some(registration) = host.registration.take() else { return };
        self.bench.leave(registration).await;
        self.ends.lock().unwrap()[&format!("w{nth}")].1.cancel();
    }

    /// Lives a request's life.
    async fn request(self: Arc<Self>, number: u64, arrival: Arrival) {
        let came = Instant::now();
        let mut want = self.bench.shared.fleet.want("demo".to_owned(), 100);
        want.number = number;
        let session = Some(arrival.session);
        want.offer = Arc::new(Offer { session, ..Offer::default() });
        let mut left = Duration::from_millis(arrival.length);
        loop {
            let now = Instant::now();
            let config = &self.bench.shared.config;
            let (worker, room) = (now + config.worker_wait, now + config.max_queue_wait);
            let patience = Patience { worker, room, deadline: None };
            let is_new = !want.admitted;
            self.enter(number, is_new);
            let seeking = self.bench.shared.fleet.acquire(&want, patience);
            let gives_up = arrival.gives_up.filter(|_| is_new).map(Duration::from_millis);
            let got = timeout(gives_up.unwrap_or(PATIENCE), seeking).await;
            let lease = match got {
                Ok(Ok(lease)) => lease,
                Ok(Err(NoPlace::Refused(_))) if is_new => return self.quit(number, false),
                Ok(Err(why)) => panic!("seed {}: {number} ends with {why:?}", self.seed),
                Err(_) => return self.quit(number, true),
            };
            let id = lease.link().worker().to_string();
            let (epoch, end) = self.ends.lock().unwrap()[&id].clone();
            self.begin(number, is_new, (id.clone(), epoch), came.elapsed());
            let began = Instant::now();
            let broke = tokio::select! {
                biased;
                () = end.cancelled() => true,
                () = sleep(left) => false,
            };
            want.admitted = true;
            want.identity = Some(lease.identity().to_owned());
            let mut ledger = self.ledger.lock().unwrap();
            *ledger.streams.get_mut(&(id, epoch)).unwrap() -= 1;
            ledger.moves += usize::from(broke);
            drop(ledger);
            drop(lease);
            left = left.saturating_sub(began.elapsed());
            if !broke {
                return;
            }
        }
    }

    fn enter(&self, number: u64, is_new: bool) {
        let mut ledger = self.ledger.lock().unwrap();
        if is_new {
            ledger.waiting.insert(number);
        } else {
            ledger.moved += 1;
        }
    }

    fn quit(&self, number: u64, gave_up: bool) {
        let mut ledger = self.ledger.lock().unwrap();
        ledger.waiting.remove(&number);
        ledger.gave_up += usize::from(gave_up);
        ledger.refused += usize::from(!gave_up);
    }

    fn begin(&self, number: u64, is_new: bool, at: (String, u64), wait: Duration) {
        let (seed, config) = (self.seed, &self.bench.shared.config);
        let mut ledger = self.ledger.lock().unwrap();
        if is_new {
            let first = ledger.waiting.first().copied();
            assert_eq!(first, Some(number), "seed {seed}: {number} overtook it");
            assert_eq!(ledger.moved, 0, "seed {seed}: {number} overtook a stream that had begun");
            assert!(wait <= config.max_queue_wait, "seed {seed}: {number} waited {wait:?}");
            ledger.waiting.remove(&number);
            let in_line = ledger.waiting.len();
            // Those that came in this very moment have not looked yet.
            assert!(in_line <= config.max_queue + 64, "seed {seed}: {in_line} wait");
            ledger.waits.push(u64::try_from(wait.as_millis()).unwrap());
        } else {
            ledger.moved -= 1;
        }
        let streams = ledger.streams.entry(at).or_default();
        *streams += 1;
        assert!(*streams <= self.slots, "seed {seed}: {streams} streams for {} slots", self.slots);
    }

    /// Has all requests come, and returns when all have ended.
    async fn live(self: &Arc<Self>, arrivals: &[Arrival]) -> JoinSet<()> {
        let begun = Instant::now();
        let mut requests = JoinSet::new();
        for arrival in arrivals {
            sleep_until(begun + Duration::from_millis(arrival.at)).await;
            let number = self.bench.shared.fleet.want(String::new(), 0).number;
            requests.spawn(Arc::clone(self).request(number, *arrival));
        }
        requests
    }
}

/// Waits until all have ended: none is lost.
async fn end(mut requests: JoinSet<()>, seed: u64) {
    let all = async {
        while let Some(ended) = requests.join_next().await {
            ended.unwrap();
        }
    };
    let ended = timeout(PATIENCE, all).await;
    assert!(ended.is_ok(), "seed {seed}: a request waits for ever");
}

fn seeds(count: u64) -> Vec<u64> {
    match std::env::var("TERCET_SEED") {
        Ok(seed) => vec![seed.parse().expect("TERCET_SEED is a number")],
        Err(_) => (1..=count).collect(),
    }
}

#[tokio::test(start_paused = true)]
async fn waits_are_those_of_one_central_queue() {
    for seed in seeds(3) {
        for (workers, slots) in [(1, 4), (2, 2), (4, 4), (16, 2)] {
            let mut dice = Dice::new(seed);
            let all = u32::try_from(workers).unwrap() * slots;
            let arrivals = arrivals(&mut dice, 3000, all, 0.95, false);
            let ideal = ideal(&arrivals, all);
            let nothing_is_refused = Duration::from_secs(3600);
            let config = Config {
                max_queue: 10_000,
                max_queue_wait: nothing_is_refused,
                routing: Routing::ALL[usize::try_from(seed).unwrap() % 5],
                ..Config::default()
            };
            let (world, _hosts) = World::new(seed, config, workers, slots).await;
            end(world.live(&arrivals).await, seed).await;
            let ledger = world.ledger.lock().unwrap();
            assert_eq!(ledger.waits.len(), arrivals.len(), "seed {seed}");
            let (got, best) = (p99(&ledger.waits), p99(&ideal));
            // Timers count whole milliseconds, and each wake-up may add one.
            assert!(
                got as f64 <= best as f64 * 1.2 + 5.0,
                "seed {seed}: {workers} workers with {slots} slots: p99 is {got} ms, not {best} ms"
            );
            assert!(best > 0, "seed {seed}: nothing had to wait");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_is_lost_or_overtaken_while_workers_come_and_go() {
    for seed in seeds(10) {
        let mut dice = Dice::new(seed);
        let workers = 2 + usize::try_from(seed % 4).unwrap();
        let slots = 1 + u32::try_from(seed % 3).unwrap();
        let all = u32::try_from(workers).unwrap() * slots;
        let arrivals = arrivals(&mut dice, 600, all, 0.9, true);
        let config = Config {
            max_queue: 20,
            max_queue_wait: Duration::from_secs(8),
            worker_wait: PATIENCE,
            routing: Routing::ALL[usize::try_from(seed).unwrap() % 5],
            ..Config::default()
        };
        let (world, mut hosts) = World::new(seed, config, workers, slots).await;
        let chaos = async {
            loop {
                sleep(Duration::from_millis(whole(dice.gap(2000.0)))).await;
                let nth = usize::try_from(whole(dice.fraction() * 1000.0)).unwrap() % workers;
                world.kill(nth, &mut hosts[nth]).await;
                sleep(Duration::from_millis(whole(dice.gap(500.0)))).await;
                world.raise(nth, &mut hosts[nth]).await;
            }
        };
        let life = async {
            let requests = world.live(&arrivals).await;
            end(requests, seed).await;
        };
        tokio::select! {
            () = chaos => {}
            () = life => {}
        }
        let ledger = world.ledger.lock().unwrap();
        let (refused, gave_up) = (ledger.refused, ledger.gave_up);
        assert_eq!(ledger.waits.len() + refused + gave_up, 600, "seed {seed}");
        assert!(ledger.waiting.is_empty() && ledger.moved == 0, "seed {seed}");
        assert!(ledger.streams.values().all(|streams| *streams == 0), "seed {seed}");
        assert!(ledger.moves > 0 && ledger.waits.iter().any(|wait| *wait > 0), "seed {seed}");
        let length = "tercet_queue_length{gen_ai_request_model=\"demo\"}";
        assert_eq!(world.bench.metric(length), 0.0, "seed {seed}");
    }
}
