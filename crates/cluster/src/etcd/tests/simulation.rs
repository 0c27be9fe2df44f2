//! The membership state machines against a store that fails in every way, in paused time.
//!
//! A seed decides what happens when. `TERCET_SEED` runs one, `TERCET_SEEDS` that many.

use std::{collections::BTreeMap, env, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::{AbortHandle, JoinSet},
    time,
};

use super::{
    super::{
        endpoints::Endpoints,
        follow::Follower,
        lease::{self, EtcdKeeper},
        prefix,
    },
    fake::{Dice, Fake, Health, MEMBERS},
    key,
};
use crate::{
    ClusterError, View, WorkerId, WorkerRecord, WorkerState, registration::Keeper as _,
    suite::record,
};

const TTL: Duration = Duration::from_secs(3);
/// Names that workers take, again and again.
const NAMES: [&str; 4] = ["a", "b", "c", "d"];
/// What happens to the store or a worker, one after the other.
const EVENTS: u32 = 80;
/// How long everything may take to be right once nothing fails any more: a silent watch is noticed
/// within 13 s, what a replaced store does not know is kept for two leases.
const SETTLED: Duration = Duration::from_secs(40);

/// One process: what it registers, and what it sees.
struct Process {
    endpoints: Arc<Endpoints>,
    views: watch::Receiver<Arc<View>>,
    /// Its registrations that are not over.
    held: Vec<Held>,
}

struct Held {
    record: WorkerRecord,
    keeper: Box<EtcdKeeper>,
    tenant: AbortHandle,
}

struct Simulation {
    seed: u64,
    dice: Dice,
    fake: Fake,
    processes: Vec<Process>,
    tasks: JoinSet<()>,
    /// Greatest epoch used with each name.
    epochs: BTreeMap<&'static str, u64>,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let mut tasks = JoinSet::new();
        let fake = Fake::start(seed);
        let process = |number: u64| {
            let endpoints = Endpoints::over(fake.channels(), None, seed ^ (number << 32));
            let endpoints = Arc::new(endpoints);
            let (view_in, views) = watch::channel(Arc::default());
            let prefix = prefix(&"test".parse().unwrap());
            let follower = Follower::new(Arc::clone(&endpoints), prefix, TTL * 2, view_in);
            tasks.spawn(follower.run());
            Process { endpoints, views, held: Vec::new() }
        };
        let processes = (1..=3).map(process).collect();
        let dice = Dice::new(!seed);
        Self { seed, dice, fake, processes, tasks, epochs: BTreeMap::new() }
    }

    /// Returns an index below `count`.
    fn index(&mut self, count: usize) -> usize {
        usize::try_from(self.dice.below(u64::try_from(count).unwrap())).unwrap()
    }

    fn register(&mut self) {
        let name = NAMES[self.index(NAMES.len())];
        let epoch = self.epochs.entry(name).or_default();
        *epoch += 1;
        let record = record(name, *epoch);
        let process = self.index(self.processes.len());
        let process = &mut self.processes[process];
        let (keeper, tenant) = lease::registration(key(name), &record);
        let kept = tenant.keep(Arc::clone(&process.endpoints), TTL, process.views.clone());
        let tenant = self.tasks.spawn(kept);
        process.held.push(Held { record, keeper: Box::new(keeper), tenant });
    }

    /// Changes, leaves, drops or kills a registration.
    fn disturb(&mut self) {
        let process = self.index(self.processes.len());
        let count = self.processes[process].held.len();
        if count == 0 {
            return;
        }
        let index = self.index(count);
        let fate = self.dice.below(6);
        let held = &mut self.processes[process].held;
        match fate {
            0 => {
                let Held { keeper, .. } = held.swap_remove(index);
                self.tasks.spawn(keeper.leave());
            }
            1 => drop(held.swap_remove(index)),
            2 => held.swap_remove(index).tenant.abort(),
            _ => {
                let Held { record, keeper, .. } = &mut held[index];
                record.max_sequences += 1;
                record.state = WorkerState::Ready;
                // Stored all the same when nobody waits.
                drop(keeper.put(record));
            }
        }
    }

    async fn happen(&mut self) {
        time::sleep(Duration::from_millis(self.dice.below(2500))).await;
        match self.dice.below(20) {
            0..5 => self.register(),
            5..10 => self.disturb(),
            10..15 => {
                let member = self.index(MEMBERS);
                let all = [Health::Up, Health::Up, Health::CutOff, Health::Silent, Health::Dead];
                let health = all[self.index(all.len())];
                self.fake.set(member, health);
            }
            15 => self.fake.compact(),
            16 => self.fake.meddle(&mut self.dice),
            17 => {
                let of_1000 = [0, 0, 100, 400][self.index(4)];
                self.fake.lose(of_1000);
            }
            18 => self.heal(),
            _ if self.dice.below(4) == 0 => {
                (0..MEMBERS).for_each(|member| self.fake.set(member, Health::Dead));
                self.fake.replace();
                time::sleep(Duration::from_millis(self.dice.below(5000))).await;
                self.heal();
            }
            _ => {}
        }
    }

    fn heal(&self) {
        (0..MEMBERS).for_each(|member| self.fake.set(member, Health::Up));
        self.fake.lose(0);
    }

    /// What is stored, read.
    fn stored(&self) -> BTreeMap<WorkerId, Arc<WorkerRecord>> {
        let prefix = prefix(&"test".parse().unwrap());
        let read = |(key, value): (Vec<u8>, Vec<u8>)| {
            let id = str::from_utf8(&key).unwrap().strip_prefix(&prefix).unwrap();
            let record = WorkerRecord::decode(id, &value).unwrap();
            (record.id.clone(), Arc::new(record))
        };
        self.fake.values().into_iter().map(read).collect()
    }

    /// Checks what must hold once nothing fails any more.
    async fn settle(mut self) {
        let seed = self.seed;
        self.heal();
        time::sleep(SETTLED).await;
        let stored = self.stored();
        for process in &self.processes {
            let view = process.views.borrow().clone();
            assert!(view.current, "seed {seed}: not current: {view:#?}");
            assert_eq!(view.workers, stored, "seed {seed}: the view is not what is stored");
        }
        let mut living = 0;
        for held in self.processes.iter_mut().flat_map(|process| &mut process.held) {
            let told = time::timeout(TTL, held.keeper.stored()).await;
            let present = stored.get(&held.record.id);
            match told {
                Ok(Ok(())) => {
                    living += 1;
                    assert_eq!(present.map(|record| &**record), Some(&held.record), "seed {seed}");
                }
                Ok(Err(ClusterError::Superseded { theirs, .. })) => {
                    assert!(theirs > held.record.epoch, "seed {seed}: {theirs}");
                }
                other => panic!("seed {seed}: {:?} ended as {other:?}", held.record),
            }
        }
        assert_eq!(stored.len(), living, "seed {seed}: the dead are still there");
        assert_eq!(self.fake.leases(), living, "seed {seed}: leases without a holder");

        // Whatever happened, nothing is written when nothing happens.
        let before = self.fake.changes().0.len();
        time::sleep(Duration::from_secs(60)).await;
        assert_eq!(self.fake.changes().0.len(), before, "seed {seed}: written for nothing");
        assert_eq!(self.stored(), stored, "seed {seed}: lapsed in peace");
    }
}

/// Holds every change of a view to what happened in the store: a worker goes only when the store
/// has let go of that record, or is another store.
async fn judge(seed: u64, fake: Fake, mut views: watch::Receiver<Arc<View>>) {
    let mut last = views.borrow_and_update().clone();
    while views.changed().await.is_ok() {
        let view = views.borrow_and_update().clone();
        let (changes, cluster) = fake.changes();
        for (id, record) in &last.workers {
            if view.workers.contains_key(id) {
                continue;
            }
            let (key, value) = (key(id.as_str()).into_bytes(), record.encode());
            let put = changes.iter().position(|change| change.value.as_ref() == Some(&value));
            let put = put.unwrap_or_else(|| panic!("seed {seed}: {record:?} was never stored"));
            let mut after = changes[put..].iter().filter(|change| change.key == key);
            let is_deleted = after.any(|change| change.value.is_none());
            let is_forgotten = changes[put].cluster != cluster;
            assert!(
                is_deleted || is_forgotten,
                "seed {seed}: {id} went from {last:#?}\nto {view:#?}\nthough the store has it"
            );
        }
        last = view;
    }
}

fn simulate(seed: u64) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut simulation = Simulation::new(seed);
        let mut judges = JoinSet::new();
        for process in &simulation.processes {
            judges.spawn(judge(seed, simulation.fake.clone(), process.views.clone()));
        }
        for _ in 0..EVENTS {
            simulation.happen().await;
        }
        simulation.settle().await;
        while let Some(judged) = judges.try_join_next() {
            judged.unwrap();
        }
    });
}

#[test]
fn whatever_fails_the_view_comes_to_be_what_is_stored() {
    let number = |name| env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    if let Some(seed) = number("TERCET_SEED") {
        return simulate(seed);
    }
    for seed in 0..number("TERCET_SEEDS").unwrap_or(12) {
        simulate(seed);
    }
}
