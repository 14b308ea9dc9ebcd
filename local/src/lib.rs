//! The embedded host: every function in one process, over SQLite and a directory.
//!
//! It builds what the handlers take as arguments, feeds them the events that AWS would, and serves
//! their routes: on loopback, or anywhere once there are keys.

pub mod config;
mod data;
mod feed;
mod init;
mod page;
mod places;
mod routes;
mod server;
mod sockets;
mod turns;
mod workers;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use admin::Admin;
use anyhow::Context;
use axum::serve::ListenerExt;
use chat::{Cache, Chat, Meter, OnLeave};
use enrichment::Enrichment;
use inference::Inference;
use inference::bundle::Bundle;
use inference::model::Model;
use inference::room::Room;
use notify::Notify;
use result::Results;
use rustix::net::sockopt::set_tcp_user_timeout;
use shared::auth::{Access, Checks, Tokens};
use shared::cache::PredictionCache;
use shared::callback::Destinations;
use shared::clock::Clock;
use shared::config::Env;
use shared::embedded::{DirBlobStore, Hub, SqliteCallers, SqliteJobQueue, SqliteJobStore, Work};
use shared::llm::Llm;
use shared::llm::models::Models;
use shared::ports::Callers;
use socket::{Socket, TicketDesk};
use submit::Submit;
use sweep::Sweep;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use webhook::Webhook;
use webhook::courier::Courier;

pub use config::Config;
pub use init::init;
pub use routes::openapi;

/// How long what is in flight may take after the signal to stop. What takes longer is taken up at
/// the next start.
const DRAIN: Duration = Duration::from_secs(25);

/// How long open requests may take after that.
const GOODBYE: Duration = Duration::from_secs(2);

/// How long a client may take nothing of what it is sent before its connection is ended, in milliseconds (tcp(7),
/// TCP_USER_TIMEOUT).
const UNREAD: u32 = 30_000;
/// Uploads that submit works at the same time.
const UPLOAD_TURNS: usize = 4;

pub(crate) type Store = SqliteJobStore;
pub(crate) type Queue = SqliteJobQueue;
pub(crate) type Blobs = DirBlobStore;
pub(crate) type Keys = SqliteCallers;

/// Every handler with its ports, ready to run.
pub struct Host {
    pub config: Config,
    pub clock: Clock,
    pub store: Store,
    pub queue: Queue,
    pub blobs: Blobs,
    pub submit: Arc<Submit<Store, Queue, Blobs>>,
    pub inference: Inference<Store, Queue, Blobs>,
    pub enrichment: Enrichment<Store, Blobs, Hub, Queue>,
    pub results: Arc<Results<Store, Queue, Blobs>>,
    pub sweep: Sweep<Store, Queue, Blobs>,
    pub admin: Arc<Admin<Store, Queue, Keys>>,
    pub chat: Arc<Chat<Keys>>,
    pub access: Arc<Access<Keys>>,
    /// Who is connected.
    pub hub: Hub,
    pub socket: Arc<Socket<Store, Queue, Blobs, Keys, Hub, Hub>>,
    pub tickets: Arc<TicketDesk<Hub>>,
    pub notify: Notify<Store, Hub, Hub, Queue>,
    /// The queue before webhook.
    pub webhooks: Queue,
    pub webhook: Webhook<Store, Queue>,
    /// Of the receivers of webhooks, by `host:port`.
    places: places::Places,
    pub model: Arc<Model>,
    /// Held for as long as the host lives: two hosts on one folder would be two queues' workers
    /// with one memory cache each.
    _lock: data::Lock,
}

impl Host {
    /// Opens the data folder and loads the model.
    ///
    /// # Errors
    /// What is missing or wrong, with the variable that sets it.
    pub async fn open(config: Config, env: &Env, clock: Clock) -> anyhow::Result<Self> {
        let data_dir = &config.data_dir;
        let lock = data::open(data_dir)?;
        let policy = config.policy;
        let callers = data::callers(data_dir)?;
        let access = access(&config, env, &callers, &clock).await?;
        let store = SqliteJobStore::open(&data_dir.join("jobs.sqlite"))?;
        // Above MAX_ATTEMPTS, or the queue gives a job up before the job's own attempts are used up.
        let queue = SqliteJobQueue::open(&data_dir.join("queue.sqlite"), clock.clone(), policy.max_attempts * 2 + 5)?;
        let webhooks = SqliteJobQueue::open(&data_dir.join("webhooks.sqlite"), clock.clone(), webhook::MAX_RECEIVES)?;
        let secret = data::secret(data_dir)?;
        let blobs = DirBlobStore::open(&data_dir.join("blobs"), &secret)?;

        let starting = inference::model::start(config.ort_library.clone());
        let digest =
            Bundle::publish(&config.model_dir, config.model_digest.as_deref(), &blobs).await.context("MODEL_DIR")?;
        let bundle = Bundle::fetch(&blobs, &digest, &data::model_folder(&config.temporary_dir)?).await?;
        let (library, sessions) = (config.ort_library.clone(), config.inference_workers);
        let model = Arc::new(tokio::task::spawn_blocking(move || Model::load(bundle, &library, sessions)).await??);
        drop(starting);

        let llm = Arc::new(llm(env).await?);
        let submit = Submit {
            jobs: store.clone(),
            queue: queue.clone(),
            blobs: blobs.clone(),
            clock: clock.clone(),
            policy,
            max_queued_bytes: config.max_queued_bytes,
            has_llm: !llm.is_offline(),
            destinations: Destinations::from_env(env)?,
            upload_turns: Semaphore::new(UPLOAD_TURNS),
        };
        let results =
            Results { jobs: store.clone(), queue: queue.clone(), blobs: blobs.clone(), clock: clock.clone(), policy };
        let inference = Inference {
            jobs: store.clone(),
            queue: queue.clone(),
            blobs: blobs.clone(),
            cache: PredictionCache::from_env(env)?,
            cache_secret: secret,
            model: Arc::clone(&model),
            template_describes: llm.is_offline(),
            room: Room::new(config.inference_workers)?,
            clock: clock.clone(),
            policy,
        };
        let (hub, access) = (Hub::default(), Arc::new(access));
        let enrichment = Enrichment {
            push: hub.clone(),
            jobs: store.clone(),
            blobs: blobs.clone(),
            llm: Arc::clone(&llm),
            // They have a feed of their own.
            prompts: None,
            clock: clock.clone(),
            policy,
        };
        let queues = [queue.clone(), webhooks.clone()];
        let sweep = Sweep::new(store.clone(), queues, blobs.clone(), clock.clone(), policy);
        let chat = Chat {
            llm,
            models: Arc::new(Models::from_env(env)?),
            meter: Arc::new(Meter::new(callers.clone(), clock.clone())),
            cache: Cache::default(),
            on_leave: OnLeave::Cancel,
        };
        let admin = Admin {
            jobs: store.clone(),
            queue: queue.clone(),
            webhooks: webhooks.clone(),
            callers,
            clock: clock.clone(),
            policy: config.policy,
        };
        let socket = Socket {
            jobs: store.clone(),
            queue: queue.clone(),
            blobs: blobs.clone(),
            access: Arc::clone(&access),
            connections: hub.clone(),
            push: hub.clone(),
            clock: clock.clone(),
            policy,
            max_queued_bytes: config.max_queued_bytes,
            has_llm: submit.has_llm,
        };
        let tickets = TicketDesk { connections: hub.clone(), clock: clock.clone(), url: "/ws".to_owned() };
        let notify =
            Notify { jobs: store.clone(), connections: hub.clone(), push: hub.clone(), webhooks: webhooks.clone() };
        let webhook = Webhook {
            jobs: store.clone(),
            queue: webhooks.clone(),
            courier: Courier::from_env(env)?,
            clock: clock.clone(),
            policy,
        };
        Ok(Self {
            config,
            clock,
            store,
            queue,
            blobs,
            submit: Arc::new(submit),
            inference,
            enrichment,
            results: Arc::new(results),
            sweep,
            admin: Arc::new(admin),
            chat: Arc::new(chat),
            access,
            hub,
            socket: Arc::new(socket),
            tickets: Arc::new(tickets),
            notify,
            webhooks,
            webhook,
            places: places::Places::new(workers::WEBHOOKS_TO_ONE),
            model,
            _lock: lock,
        })
    }

    /// Serves and works until `stop` completes, then lets what is in flight finish. `ready` is
    /// told the address.
    ///
    /// # Errors
    /// Where the address cannot be bound or the server fails.
    pub async fn run(
        self,
        stop: impl Future<Output = ()> + Send + 'static,
        ready: impl FnOnce(SocketAddr),
    ) -> anyhow::Result<()> {
        let address = self.config.listen_addr;
        let listener =
            TcpListener::bind(address).await.with_context(|| format!("LISTEN_ADDR: cannot listen on {address}"))?;
        ready(listener.local_addr()?);
        let host = Arc::new(self);
        if let Err(error) = workers::take_over(&host).await {
            // Then it waits until its leases have run out.
            workers::failed("work that was cut off not taken up", &error);
        }
        let (stopper, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        for _ in 0..host.config.inference_workers * workers::AHEAD {
            tasks.spawn(workers::inference(Arc::clone(&host), stopped.clone()));
        }
        for work in [Work::Description, Work::Prompt] {
            tasks.spawn(feed::enrichment(Arc::clone(&host), work, stopped.clone()));
        }
        tasks.spawn(sockets::notify(Arc::clone(&host), stopped.clone()));
        for _ in 0..workers::WEBHOOKS {
            tasks.spawn(workers::webhooks(Arc::clone(&host), stopped.clone()));
        }
        tasks.spawn(workers::sweep(Arc::clone(&host), stopped.clone()));
        tasks.spawn(workers::housekeeping(Arc::clone(&host), stopped.clone()));
        let listener = listener.tap_io(|stream| {
            // The pieces of a stream are small, and each is waited for.
            let _ = stream.set_nodelay(true);
            // Whoever reads no more would be waited for as long as they stay, and what they asked for be held.
            let _ = set_tcp_user_timeout(&*stream, UNREAD);
        });
        let server = tokio::spawn(server::serve(listener, routes::router(&host)?, server::most_connections(), stopped));

        let ended = tokio::select! {
            () = stop => None,
            ended = tasks.join_next() => ended,
        };
        tracing::info!("stopping: what is in flight is finished first");
        let _ = stopper.send(true);
        let drained = tokio::time::timeout(DRAIN, async { while tasks.join_next().await.is_some() {} }).await;
        // Who still long-polls loses nothing by asking again.
        let served = tokio::time::timeout(GOODBYE, server).await;
        if drained.is_err() || served.is_err() {
            tracing::warn!("stopped before everything was finished; the next start takes it up");
        }
        if let Some(Err(panic)) = ended {
            return Err(panic).context("a worker has ended; serving on without it would only look healthy");
        }
        if let Ok(Err(panic)) = served {
            return Err(panic).context("the HTTP server failed");
        }
        Ok(())
    }
}

/// Keyless only where no key was ever made and no issuer is set: a revoked last key must not open
/// the door to everyone.
async fn access(config: &Config, env: &Env, callers: &Keys, clock: &Clock) -> anyhow::Result<Access<Keys>> {
    let tokens = Tokens::from_env(env, clock.clone())?;
    if tokens.is_none() && callers.keys().await?.is_empty() {
        config.check_keyless()?;
        return Ok(Access::Keyless);
    }
    let (callers, limits, clock) = (callers.clone(), config.limits, clock.clone());
    Ok(Access::Checked(Box::new(Checks { callers, tokens, limits, clock })))
}

/// Who answers. Only for an agent of Bedrock is AWS's SDK asked, which may look for credentials in the network.
async fn llm(env: &Env) -> anyhow::Result<Llm> {
    #[cfg(feature = "bedrock")]
    if env.text("BEDROCK_AGENT_ID")?.is_some() {
        return Ok(Llm::with_agents(env, &shared::aws::sdk_config().await)?);
    }
    Ok(Llm::from_env(env)?)
}
