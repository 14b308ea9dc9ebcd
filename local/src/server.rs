//! HTTP/1.1 for the routes. `axum::serve` gives hyper no clock, and waits without end for whoever never sends all of a
//! request's head.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::serve::Listener;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore, mpsc, watch};

/// How long a connection may lie unused and then take for a request's head. reqwest keeps one that is unused for 90 s,
/// and should find it open when it asks again.
const HEAD: Duration = Duration::from_secs(120);

/// Files that a process may have open and that connections leave to databases, photos and what the host asks itself.
const OTHER_FILES: u64 = 512;
/// Connections at once, where the system allows for more files.
const MOST_CONNECTIONS: u64 = 16_384;

/// How many connections are taken at once: a photo is not failed because strangers hold all files. Raises the limit
/// of this process as far as it may.
pub(crate) fn most_connections() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(MOST_CONNECTIONS + OTHER_FILES, |most| most.min(MOST_CONNECTIONS + OTHER_FILES));
    let files = match limit.current {
        Some(current) if current < wanted => {
            let raised = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: limit.maximum });
            raised.map_or(current, |()| wanted)
        }
        _ => wanted,
    };
    usize::try_from(files.saturating_sub(OTHER_FILES).max(files / 2)).unwrap_or(usize::MAX)
}

/// A connection's place among those that are taken at once. Each request has it in its extensions: whoever goes on
/// with the connection behind an upgrade keeps it.
#[derive(Clone)]
pub(crate) struct Place {
    _held: Arc<OwnedSemaphorePermit>,
}

/// Serves `most` connections at once until `stopped` says so, and then until what is under way has been answered.
/// Those beyond wait to be taken.
pub(crate) async fn serve(mut listener: impl Listener, router: Router, most: usize, stopped: watch::Receiver<bool>) {
    let (open, mut closed) = mpsc::channel::<()>(1);
    let places = Arc::new(Semaphore::new(most));
    loop {
        let accept = async {
            let held = Arc::clone(&places).acquire_owned().await?;
            Ok::<_, AcquireError>((listener.accept().await.0, Place { _held: Arc::new(held) }))
        };
        let (io, place) = tokio::select! {
            Ok(taken) = accept => taken,
            () = told(stopped.clone()) => break,
        };
        let (router, stopped, open) = (router.clone(), stopped.clone(), open.clone());
        tokio::spawn(async move {
            connection(io, router, place, stopped).await;
            drop(open);
        });
    }
    drop((listener, open));
    closed.recv().await;
}

async fn told(mut stopped: watch::Receiver<bool>) {
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

async fn connection(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    place: Place,
    stopped: watch::Receiver<bool>,
) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD);
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(place.clone());
        router.call(request)
    });
    let mut connection = pin!(http.serve_connection(TokioIo::new(io), service).with_upgrades());
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = told(stopped) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    // Its client has broken off, sent what is no HTTP, or taken too long: nobody is left to be told.
    drop(ended);
}

#[cfg(test)]
mod tests {
    use axum::Extension;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::sync::Notify;
    use tokio::time::{Instant, sleep};

    use super::*;

    /// The client's end of a connection, and what stops the server.
    fn connect(router: Router) -> (DuplexStream, watch::Sender<bool>) {
        let ((client, server), (stop, stopped)) = (duplex(4096), watch::channel(false));
        let held = Arc::new(Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap());
        tokio::spawn(connection(server, router, Place { _held: held }, stopped));
        (client, stop)
    }

    fn router() -> Router {
        Router::new().route("/", get(async || "here"))
    }

    /// What comes until the server closes.
    async fn rest(client: &mut DuplexStream) -> String {
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_sends_a_head_byte_by_byte_is_not_waited_for_without_end() {
        let (mut client, _stop) = connect(router());
        let started = Instant::now();
        for byte in "GET / HTTP/1.1\r\nhost: localhost\r\n".bytes() {
            if client.write_all(&[byte]).await.is_err() {
                break;
            }
            sleep(Duration::from_secs(10)).await;
        }
        assert_eq!(rest(&mut client).await, "");
        assert!(started.elapsed() < HEAD + Duration::from_secs(11), "{:?}", started.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_nobody_uses_is_closed_but_not_while_clients_still_keep_it() {
        let (mut client, _stop) = connect(router());
        let mut answered = [0; 1024];
        for _ in 0..3 {
            client.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
            let length = client.read(&mut answered).await.unwrap();
            assert!(answered[..length].ends_with(b"here"));
            sleep(Duration::from_secs(90)).await;
        }
        assert_eq!(rest(&mut client).await, "");
    }

    #[tokio::test]
    async fn connections_beyond_the_most_wait_until_another_ends() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, (_stop, stopped)) = (listener.local_addr().unwrap(), watch::channel(false));
        tokio::spawn(serve(listener, router(), 1, stopped));
        let connect = async || {
            let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
            client.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
            client
        };
        let (mut first, mut answered) = (connect().await, [0; 1024]);
        assert!(first.read(&mut answered).await.unwrap() > 0);
        let mut second = connect().await;
        let early = tokio::time::timeout(Duration::from_millis(200), second.read(&mut answered)).await;
        assert!(early.is_err(), "it was let in");
        drop(first);
        assert!(second.read(&mut answered).await.unwrap() > 0);
    }

    #[tokio::test]
    async fn whoever_goes_on_with_a_connection_behind_its_answer_keeps_its_place() {
        let (keep, mut kept) = mpsc::channel(1);
        let router = Router::new().route(
            "/",
            get(async move |Extension(place): Extension<Place>| keep.send(place).await.is_ok().to_string()),
        );
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, (_stop, stopped)) = (listener.local_addr().unwrap(), watch::channel(false));
        tokio::spawn(serve(listener, router, 1, stopped));
        let ask = async || {
            let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
            client.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.map(|_| answer)
        };
        assert!(ask().await.unwrap().ends_with("true"));
        let mut second = Box::pin(ask());
        assert!(tokio::time::timeout(Duration::from_millis(200), &mut second).await.is_err(), "it was let in");
        drop(kept.recv().await.unwrap());
        assert!(second.await.unwrap().ends_with("true"));
    }

    #[test]
    fn connections_leave_files_for_the_rest_of_the_host() {
        let most = most_connections() as u64;
        let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        assert!(most >= 1 && most + OTHER_FILES.min(files / 2) <= files, "{most} connections, {files} files");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_ends_what_is_unused_and_lets_what_is_under_way_finish() {
        let (asked, go) = (std::sync::Arc::new(Notify::new()), std::sync::Arc::new(Notify::new()));
        let (told, wait) = (asked.clone(), go.clone());
        let slow = get(async move || {
            told.notify_one();
            wait.notified().await;
            "late"
        });
        let (mut client, stop) = connect(router().route("/slow", slow));
        client.write_all(b"GET /slow HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
        asked.notified().await;
        let (mut idle, stop_idle) = connect(router());
        stop.send(true).unwrap();
        stop_idle.send(true).unwrap();
        assert_eq!(rest(&mut idle).await, "");
        go.notify_one();
        let answer = rest(&mut client).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("late"), "{answer}");
    }
}
