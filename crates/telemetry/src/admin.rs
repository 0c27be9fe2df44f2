//! The admin server: `/metrics`, `/livez`, `/readyz` over HTTP/1.

use std::fmt;
use std::future::{Future, Ready, ready};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::Metrics;

/// How long open connections get to finish once the server is told to stop. Answers take
/// microseconds; only a peer that does not read takes longer.
const GRACE: Duration = Duration::from_secs(1);

/// What OpenMetrics calls itself.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Answers a probe: well, or why not.
#[derive(Clone)]
pub struct Probe(Arc<dyn Fn() -> Result<(), String> + Send + Sync>);

impl Probe {
    /// Returns a probe that asks `check`, which must not block.
    pub fn new(check: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(check))
    }

    /// Returns a probe that always succeeds: that the server answers is all there is to know.
    pub fn always() -> Self {
        Self::new(|| Ok(()))
    }
}

impl fmt::Debug for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Probe").finish_non_exhaustive()
    }
}

/// What the admin server tells.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Told at `/metrics`.
    pub metrics: Metrics,
    /// Asked at `/livez`: whether this process is worth keeping. Depends on nothing outside of it.
    pub live: Probe,
    /// Asked at `/readyz`: whether requests should come here now.
    pub ready: Probe,
}

/// Serves the admin endpoints on `listener` until `shutdown` resolves.
pub async fn serve_admin(
    listener: TcpListener,
    admin: Admin,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let Admin { metrics, live, ready } = admin;
    let router = Router::new()
        .route("/metrics", get(metrics_text).with_state(metrics))
        .route("/livez", get(probe).with_state(live))
        .route("/readyz", get(probe).with_state(ready));

    let (stopping, stopped) = oneshot::channel();
    let signal = async move {
        shutdown.await;
        drop(stopping);
    };
    let overdue = async move {
        // Resolves when `signal` drops its end.
        stopped.await.unwrap_or(());
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        served = axum::serve(listener, router).with_graceful_shutdown(signal) => served,
        () = overdue => Ok(()),
    }
}

fn metrics_text(State(metrics): State<Metrics>) -> Ready<impl IntoResponse> {
    ready(([(header::CONTENT_TYPE, OPENMETRICS)], metrics.encode()))
}

fn probe(State(probe): State<Probe>) -> Ready<(StatusCode, String)> {
    ready(match (probe.0)() {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    })
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::task::JoinSet;

    use super::*;

    /// Starts a server that is ready while the flag is set.
    async fn start() -> (SocketAddr, Arc<AtomicBool>, oneshot::Sender<()>, JoinSet<io::Result<()>>)
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let is_ready = Arc::new(AtomicBool::new(false));
        let ready = Arc::clone(&is_ready);
        let admin = Admin {
            metrics: Metrics::new(),
            live: Probe::always(),
            ready: Probe::new(move || {
                if ready.load(Ordering::Relaxed) { Ok(()) } else { Err("loading".to_owned()) }
            }),
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async move { stopped.await.unwrap_or(()) };
        let mut server = JoinSet::new();
        server.spawn(serve_admin(listener, admin, shutdown));
        (address, is_ready, stop, server)
    }

    /// Returns status line, headers and body.
    async fn fetch(address: SocketAddr, path: &str) -> (String, String, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let (status, headers) = head.split_once("\r\n").unwrap();
        (status.to_owned(), headers.to_owned(), body.to_owned())
    }

    #[tokio::test]
    async fn probes_and_metrics_are_served() {
        let (address, is_ready, stop, mut server) = start().await;
        assert_eq!(fetch(address, "/livez").await.0, "HTTP/1.1 200 OK");
        let (status, _, body) = fetch(address, "/readyz").await;
        assert_eq!(status, "HTTP/1.1 503 Service Unavailable");
        assert_eq!(body, "loading\n");
        is_ready.store(true, Ordering::Relaxed);
        assert_eq!(fetch(address, "/readyz").await.0, "HTTP/1.1 200 OK");

        let (status, headers, body) = fetch(address, "/metrics").await;
        assert_eq!(status, "HTTP/1.1 200 OK");
        assert!(headers.contains(OPENMETRICS), "{headers}");
        assert!(body.ends_with("# EOF\n"), "{body}");

        drop(stop);
        server.join_next().await.unwrap().unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_stuck_connection_does_not_hold_up_the_shutdown() {
        let (address, _, stop, mut server) = start().await;
        let mut stuck = TcpStream::connect(address).await.unwrap();
        stuck.write_all(b"GET /metr").await.unwrap();
        // The server has accepted it once it answers a later connection.
        fetch(address, "/livez").await;
        drop(stop);
        let stopped = tokio::time::timeout(GRACE * 2, server.join_next()).await.unwrap();
        stopped.unwrap().unwrap().unwrap();
    }
}
