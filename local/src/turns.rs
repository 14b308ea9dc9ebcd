//! Bodies are taken in a few at a time, and none for ever: what clients send bounds what we hold.
//!
//! Triggered by every request to submit, admin and chat, before its body is read. Reads and writes nothing.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use futures_util::StreamExt;
use shared::auth::Identity;
use shared::error::{Code, Error};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use crate::places::Places;

/// Photos, prompts and announcements of uploads taken in at the same time; a photo as JSON holds some 25 MB for as long
/// as it takes.
const TURNS: usize = 16;
/// Of them by one caller, who may be slow.
const TURNS_OF_ONE: usize = 12;
/// What long requests to chat hold together, from their first byte to the end of their answers.
pub(crate) const ROOM_KIB: usize = 128 * 1024;
/// A body of unknown length, or of one that is refused when it comes to that, is taken to be so long.
const LONGEST_BYTES: u64 = chat::MAX_BODY_BYTES as u64;
/// A body that is no longer is let in at any time.
const SHORT_BYTES: u64 = 64 * 1024;
/// How long a request waits for its turn or for room, its body unread.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a body may take to arrive: 4 MiB at 70 kB a second, 6 MiB at 105.
const ARRIVAL: Duration = Duration::from_secs(60);

/// Whose turn it is.
pub(crate) struct Turns {
    all: Semaphore,
    of_one: Places,
}

impl Turns {
    pub(crate) fn new() -> Self {
        Self { all: Semaphore::new(TURNS), of_one: Places::new(TURNS_OF_ONE) }
    }

    async fn take(&self, caller: &str) -> Option<impl Sized> {
        let own = self.of_one.take(caller).await?;
        Some((own, self.all.acquire().await.ok()?))
    }
}

/// Lets a request in when it is its turn.
pub(crate) async fn in_turn(State(turns): State<Arc<Turns>>, request: Request, next: Next) -> Result<Response, Error> {
    let caller = request.extensions().get().map_or_else(String::new, |identity: &Identity| identity.caller.clone());
    turn(&turns, &caller, request, |request| next.run(request)).await
}

async fn turn<F: Future<Output = Response>>(
    turns: &Turns,
    caller: &str,
    request: Request,
    answer: impl FnOnce(Request) -> F,
) -> Result<Response, Error> {
    let busy = || Error::too_many_requests("Too many photos are arriving at the moment. Try again.", 5);
    let _turn = timeout(PATIENCE, turns.take(caller)).await.ok().flatten().ok_or_else(busy)?;
    arriving(request, answer).await
}

/// Lets a request in when there is room for its body.
pub(crate) async fn with_room(
    State(room): State<Arc<Semaphore>>,
    request: Request,
    next: Next,
) -> Result<Response, Error> {
    within(room, request, |request| next.run(request)).await
}

/// Lets a request in at once: its body is short.
pub(crate) async fn in_time(request: Request, next: Next) -> Result<Response, Error> {
    arriving(request, |request| next.run(request)).await
}

/// A long body is kept until the answer has ended, in case the model must be asked again.
async fn within<F: Future<Output = Response>>(
    room: Arc<Semaphore>,
    request: Request,
    answer: impl FnOnce(Request) -> F,
) -> Result<Response, Error> {
    let size_bytes = request.body().size_hint().upper().map_or(LONGEST_BYTES, |bytes| bytes.min(LONGEST_BYTES));
    if size_bytes <= SHORT_BYTES {
        return arriving(request, answer).await;
    }
    let busy = || Error::too_many_requests("Too many long requests are under way at the moment. Try again.", 5);
    let size_kib = u32::try_from(size_bytes.div_ceil(1024)).map_err(Error::internal)?;
    let place = timeout(PATIENCE, room.acquire_many_owned(size_kib)).await.map_err(|_| busy())?;
    let place = place.map_err(|_| busy())?;
    let response = arriving(request, answer).await?;
    // Whoever has a length is there as a whole, and what was asked is gone.
    if response.body().size_hint().exact().is_some() {
        return Ok(response);
    }
    Ok(response.map(|body| holding(body, place)))
}

/// Answers a request, whose body has its time to arrive. What comes after that is not the client's to hurry.
async fn arriving<F: Future<Output = Response>>(
    request: Request,
    answer: impl FnOnce(Request) -> F,
) -> Result<Response, Error> {
    // Whoever reads a body drops it then.
    let (unread, read) = oneshot::channel::<()>();
    let answer = answer(request.map(|body| holding(body, unread)));
    let late = async {
        if timeout(ARRIVAL, read).await.is_ok() {
            pending::<()>().await;
        }
    };
    tokio::select! {
        // Without a timer for what is there at once.
        biased;
        response = answer => Ok(response),
        () = late => Err(Error::new(Code::InvalidRequest, "The body did not arrive within 60 seconds.")),
    }
}

/// The same body, which holds something until it is dropped.
fn holding(body: Body, held: impl Send + 'static) -> Body {
    Body::from_stream(body.into_data_stream().map(move |piece| {
        let _ = &held;
        piece
    }))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use axum::body::{Bytes, to_bytes};
    use axum::response::IntoResponse;
    use futures_util::future::join_all;
    use futures_util::stream;
    use tokio::time::{Instant, sleep};

    use super::*;

    /// A body that begins and does not end.
    fn unsent() -> Body {
        let begun = stream::iter([Ok::<_, Infallible>(Bytes::from_static(b"{"))]);
        Body::from_stream(begun.chain(stream::pending()))
    }

    /// Reads the body as every handler does.
    async fn read(request: Request) -> Response {
        let length = to_bytes(request.into_body(), usize::MAX).await.unwrap().len();
        length.to_string().into_response()
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_arrive_is_refused_after_a_minute_and_frees_its_room() {
        let room = Arc::new(Semaphore::new(ROOM_KIB));
        let started = Instant::now();
        let mut slow = Box::pin(within(Arc::clone(&room), Request::new(unsent()), read));
        assert!(timeout(ARRIVAL / 2, &mut slow).await.is_err());
        assert_eq!(room.available_permits(), ROOM_KIB - 6 * 1024);
        let error = slow.await.unwrap_err();
        assert_eq!((error.code(), started.elapsed().as_secs()), (Code::InvalidRequest, 60));
        assert_eq!(room.available_permits(), ROOM_KIB);
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_whose_photos_do_not_arrive_leaves_turns_to_others() {
        let (turns, started) = (Turns::new(), Instant::now());
        let ask = |caller, body| turn(&turns, caller, Request::new(body), read);
        let slow = join_all((0..TURNS_OF_ONE).map(|_| ask("slow", unsent())));
        let others = async {
            let error = ask("slow", Body::empty()).await.unwrap_err();
            assert_eq!((error.code(), started.elapsed().as_secs()), (Code::TooManyRequests, 10));
            assert_eq!(ask("other", Body::empty()).await.unwrap().status().as_u16(), 200);
            assert_eq!(started.elapsed().as_secs(), 10);
        };
        let (slow, ()) = tokio::join!(slow, others);
        assert!(slow.iter().all(Result::is_err));
        assert_eq!(ask("slow", Body::empty()).await.unwrap().status().as_u16(), 200);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_comes_byte_by_byte_has_no_more_time_than_one_that_stops() {
        let bytes = stream::repeat(Bytes::from_static(b" ")).then(|byte| async move {
            sleep(ARRIVAL / 10).await;
            Ok::<_, Infallible>(byte)
        });
        let started = Instant::now();
        let error = arriving(Request::new(Body::from_stream(bytes)), read).await.unwrap_err();
        assert_eq!((error.code(), started.elapsed().as_secs()), (Code::InvalidRequest, 60));
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_stalls_longer_than_a_body_may_is_not_the_clients_fault() {
        let answer = |request| async {
            read(request).await;
            sleep(10 * ARRIVAL).await;
            Error::unavailable("the store", "locked").into_response()
        };
        let response = arriving(Request::new(Body::from("{}")), answer).await.unwrap();
        assert_eq!(response.status().as_u16(), 503);
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_body_waits_for_room_and_is_refused_at_last_while_a_short_one_passes() {
        let room = Arc::new(Semaphore::new(ROOM_KIB));
        let all = Arc::clone(&room).acquire_many_owned(ROOM_KIB as u32).await.unwrap();
        let ask = |length: usize| within(Arc::clone(&room), Request::new(Body::from("x".repeat(length))), read);
        let short = SHORT_BYTES as usize;
        let started = Instant::now();
        assert_eq!(ask(short).await.unwrap().status().as_u16(), 200);
        assert_eq!(started.elapsed(), Duration::ZERO);
        let error = ask(short + 1).await.unwrap_err();
        assert_eq!((error.code(), started.elapsed().as_secs()), (Code::TooManyRequests, 10));
        drop(all);
        // Longer than is taken: it is let in, and refused where it is read.
        assert_eq!(ask(2 * LONGEST_BYTES as usize).await.unwrap().status().as_u16(), 200);
        assert_eq!(room.available_permits(), ROOM_KIB);
    }

    #[tokio::test]
    async fn a_long_body_has_its_room_until_the_stream_that_answers_it_has_ended() {
        let room = Arc::new(Semaphore::new(ROOM_KIB));
        let answer = |request| async {
            read(request).await;
            let pieces = stream::iter(["a", "b"].map(Ok::<_, Infallible>));
            Body::from_stream(pieces).into_response()
        };
        let request = Request::new(Body::from(vec![b'x'; 1024 * 1024]));
        let response = within(Arc::clone(&room), request, answer).await.unwrap();
        assert_eq!(room.available_permits(), ROOM_KIB - 1024);
        assert_eq!(to_bytes(response.into_body(), 10).await.unwrap(), "ab");
        assert_eq!(room.available_permits(), ROOM_KIB);
    }
}
