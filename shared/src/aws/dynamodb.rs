//! The records in one DynamoDB table, whose stream is their change feed.
//!
//! | item | `id` | beside it |
//! | --- | --- | --- |
//! | job, tombstone, upload | the record's id | the columns that conditions and indexes name, and the record as JSON |
//! | idempotency item | `key#<length>#<caller>#<key>` | fingerprint, job |
//! | what a caller has queued | `usage#<caller>` | `queued_bytes` |
//!
//! Two sparse indexes: `due` (`due_shard`, `due_at`) holds what sweep must look at, `callers`
//! (`listed_by`, `id`) the jobs that a caller may list. `ttl` deletes items, in its own time.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use aws_config::SdkConfig;
use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::error::SdkError;
use aws_sdk_dynamodb::operation::delete_item::DeleteItemError;
use aws_sdk_dynamodb::operation::put_item::PutItemError;
use aws_sdk_dynamodb::operation::transact_write_items::TransactWriteItemsError;
use aws_sdk_dynamodb::types::{
    AttributeValue, Delete, Put, ReturnValuesOnConditionCheckFailure, TransactWriteItem, Update,
};
use rand::RngExt;
use uuid::Uuid;

use crate::clock::{Timestamp, from_millis};
use crate::create::IDEMPOTENCY_TTL;
use crate::error::Error;
use crate::job::{Dispatch, Fence, Job, Record, Tombstone, Upload};
use crate::ports::{Created, Creation, Idempotency, JobStore, Page};

pub(super) type Item = HashMap<String, AttributeValue>;

const WHAT: &str = "the job store";
/// Partitions of the index of due records: one alone takes a thousand writes a second.
const DUE_SHARDS: u128 = 8;
/// How often a transaction is tried that met another one on the same item.
pub(super) const MAX_TRIES: u32 = 6;
const CONFLICT_PAUSE: Duration = Duration::from_millis(20);

/// Jobs in one table.
#[derive(Debug, Clone)]
pub struct DynamoJobStore {
    client: Client,
    table: String,
}

/// The shards of the index of due records that may hold more, each with the key behind which it goes on.
#[derive(Debug, Clone)]
pub struct DuePosition(BTreeMap<u128, Option<Item>>);

/// How a transaction ended.
enum Transacted {
    Written,
    /// The place of the first write whose condition did not hold.
    Refused(usize),
}

impl DynamoJobStore {
    #[must_use]
    pub fn new(config: &SdkConfig, table: String) -> Self {
        Self { client: Client::new(config), table }
    }

    async fn item(&self, id: &str) -> Result<Option<Item>, Error> {
        let get = self.client.get_item().table_name(&self.table).key("id", text(id)).consistent_read(true);
        Ok(get.send().await.map_err(unavailable)?.item)
    }

    /// All of `writes` or none, tried again where another transaction was in the way.
    async fn transact(&self, writes: Vec<TransactWriteItem>) -> Result<Transacted, Error> {
        for attempt in 0..MAX_TRIES {
            let sent = self.client.transact_write_items().set_transact_items(Some(writes.clone())).send().await;
            let error = match sent {
                Ok(_) => return Ok(Transacted::Written),
                Err(error) => error,
            };
            let Some(TransactWriteItemsError::TransactionCanceledException(cancelled)) = error.as_service_error()
            else {
                return Err(unavailable(error));
            };
            let reasons = cancelled.cancellation_reasons();
            let place = |code: &str| reasons.iter().position(|reason| reason.code() == Some(code));
            if let Some(place) = place("ConditionalCheckFailed") {
                return Ok(Transacted::Refused(place));
            }
            if place("TransactionConflict").is_none() {
                return Err(unavailable(error));
            }
            conflict_pause(attempt).await;
        }
        Err(Error::unavailable(WHAT, "a transaction kept meeting others"))
    }

    fn put(&self, item: Item, condition: Condition) -> TransactWriteItem {
        let put = Put::builder().table_name(&self.table).set_item(Some(item));
        let put = put
            .condition_expression(condition.expression)
            .set_expression_attribute_names(names(&condition))
            .set_expression_attribute_values(values(condition.values))
            .build();
        // Built from parts that are all there.
        TransactWriteItem::builder().set_put(put.ok()).build()
    }

    /// Adds `delta` to what a caller has queued, where that leaves it at `most` or below.
    fn settle_usage(&self, caller: &str, delta: i128, most: Option<i128>) -> TransactWriteItem {
        let mut update = Update::builder()
            .table_name(&self.table)
            .key("id", text(format!("usage#{caller}")))
            .update_expression("ADD queued_bytes :delta")
            .expression_attribute_values(":delta", number(delta));
        if let Some(most) = most {
            update = update
                .condition_expression("attribute_not_exists(queued_bytes) OR queued_bytes <= :room")
                .expression_attribute_values(":room", number(most - delta));
        }
        TransactWriteItem::builder().set_update(update.build().ok()).build()
    }

    fn replacement(&self, fence: Fence, after: &Record) -> Result<Vec<TransactWriteItem>, Error> {
        let mut writes = vec![self.put(item(after)?, Condition::of(fence))];
        let delta = i128::from(after.queued_bytes()) - i128::from(fence.queued_bytes);
        if delta != 0 {
            writes.push(self.settle_usage(after.caller(), delta, None));
        }
        Ok(writes)
    }

    /// A single conditional put. Where its answer was lost and the SDK has sent it again, the second
    /// finds the first's item: `write_id` tells that it was ours.
    async fn put_alone(&self, item: Item, condition: Condition) -> Result<bool, Error> {
        let write_id = item.get("write_id").cloned();
        let put = self
            .client
            .put_item()
            .table_name(&self.table)
            .set_item(Some(item))
            .condition_expression(condition.expression)
            .set_expression_attribute_names(names(&condition))
            .set_expression_attribute_values(values(condition.values))
            .return_values_on_condition_check_failure(ReturnValuesOnConditionCheckFailure::AllOld);
        match put.send().await {
            Ok(_) => Ok(true),
            Err(SdkError::ServiceError(error)) => match error.into_err() {
                PutItemError::ConditionalCheckFailedException(failed) => {
                    Ok(failed.item().is_some_and(|found| found.get("write_id") == write_id.as_ref()))
                }
                error => Err(unavailable(error)),
            },
            Err(error) => Err(unavailable(error)),
        }
    }

    /// Deletes the item of a key whose time is over, which TTL may leave for days, unless it is another job's by now.
    async fn delete_key_of(&self, job: &Job, key: &str) {
        let delete = self
            .client
            .delete_item()
            .table_name(&self.table)
            .key("id", text(key_id(&job.caller, key)))
            .condition_expression("#job = :id")
            .expression_attribute_names("#job", "job")
            .expression_attribute_values(":id", text(job.id.to_string()));
        if let Err(error) = delete.send().await
            && !error.as_service_error().is_some_and(DeleteItemError::is_conditional_check_failed_exception)
        {
            let error = unavailable(error);
            tracing::warn!(job.id = %job.id, error.chain = error.chain(), "key of a deleted job not deleted; it expires");
        }
    }
}

/// Between two tries of a transaction that met another one.
pub(super) async fn conflict_pause(attempt: u32) {
    let jitter = rand::rng().random_range(0.5..1.0);
    tokio::time::sleep((CONFLICT_PAUSE * 2_u32.pow(attempt)).mul_f64(jitter)).await;
}

impl JobStore for DynamoJobStore {
    type Position = DuePosition;

    async fn create(&self, creation: Creation) -> Result<Created, Error> {
        let Creation { job, idempotency, upload, max_queued_bytes } = creation;
        let now = job.created_at;
        let (caller, size) = (job.caller.clone(), i128::from(job.queued_bytes()));
        let mut writes = Vec::new();
        if let Some(item) = &idempotency {
            writes.push(self.put(idempotency_item(item), Condition::free_key(now)));
        }
        match &upload {
            Some(upload) => {
                let used = Record::Upload(upload.used(now));
                let fence = Record::Upload(upload.clone()).fence();
                writes.push(self.put(item(&used)?, Condition::of(fence)));
                writes.push(self.settle_usage(&caller, size - i128::from(fence.queued_bytes), None));
            }
            None => writes.push(self.settle_usage(&caller, size, Some(i128::from(max_queued_bytes)))),
        }
        writes.push(self.put(item(&Record::Job(job))?, Condition::new_item()));
        let behind_key = match self.transact(writes).await? {
            Transacted::Written => return Ok(Created::New),
            Transacted::Refused(0) if idempotency.is_some() => None,
            Transacted::Refused(place) => Some(place - usize::from(idempotency.is_some())),
        };
        match (behind_key, &idempotency) {
            (Some(0), _) if upload.is_some() => Ok(Created::UploadTaken),
            (Some(0), _) => Ok(Created::QueueFull),
            (None, Some(item)) => {
                let taken = self.idempotency(&item.caller, &item.key, now).await?;
                // Deleted between the two: the client repeats the request.
                taken.map(Created::KeyTaken).ok_or_else(|| Error::unavailable(WHAT, "a key was taken and given back"))
            }
            _ => Err(Error::internal("an id was given twice")),
        }
    }

    async fn reserve(&self, upload: &Upload, max_queued_bytes: u64) -> Result<bool, Error> {
        let size = i128::from(upload.size_bytes);
        let record = Record::Upload(upload.clone());
        let writes = vec![
            self.settle_usage(&upload.caller, size, Some(i128::from(max_queued_bytes))),
            self.put(item(&record)?, Condition::new_item()),
        ];
        Ok(matches!(self.transact(writes).await?, Transacted::Written))
    }

    async fn idempotency(&self, caller: &str, key: &str, now: Timestamp) -> Result<Option<Idempotency>, Error> {
        let Some(item) = self.item(&key_id(caller, key)).await? else { return Ok(None) };
        let found = read_idempotency(&item, caller, key);
        let found = found.ok_or_else(|| Error::internal("an idempotency item without its parts"))?;
        // TTL deletes late.
        Ok(Some(found).filter(|item| item.expires_at > now))
    }

    async fn get(&self, id: Uuid) -> Result<Option<Record>, Error> {
        self.item(&id.to_string()).await?.map(|item| read(&item)).transpose()
    }

    async fn replace(&self, fence: Fence, after: &Record) -> Result<bool, Error> {
        if after.queued_bytes() == fence.queued_bytes {
            return self.put_alone(item(after)?, Condition::of(fence)).await;
        }
        Ok(matches!(self.transact(self.replacement(fence, after)?).await?, Transacted::Written))
    }

    async fn bury(&self, job: &Job, tombstone: &Tombstone) -> Result<bool, Error> {
        let mut writes = self.replacement(job.fence(), &Record::Tombstone(tombstone.clone()))?;
        // Later the item may be another job's. A condition here would not do: it is no reason to bury nothing.
        let is_own = tombstone.erase_after < job.created_at + IDEMPOTENCY_TTL;
        if let Some(key) = job.idempotency_key.as_ref().filter(|_| is_own) {
            let delete = Delete::builder().table_name(&self.table).key("id", text(key_id(&job.caller, key)));
            writes.push(TransactWriteItem::builder().set_delete(delete.build().ok()).build());
        }
        let is_written = matches!(self.transact(writes).await?, Transacted::Written);
        if let Some(key) = job.idempotency_key.as_ref().filter(|_| is_written && !is_own) {
            self.delete_key_of(job, key).await;
        }
        Ok(is_written)
    }

    async fn due(
        &self,
        now: Timestamp,
        after: Option<&DuePosition>,
        limit: u32,
    ) -> Result<Page<Record, DuePosition>, Error> {
        let mut shards = match after {
            Some(DuePosition(shards)) => shards.clone(),
            None => (0..DUE_SHARDS).map(|shard| (shard, None)).collect(),
        };
        let (mut found, mut ends): (Vec<(u128, Item)>, _) = (Vec::new(), HashMap::new());
        for (&shard, start) in &shards {
            let query = self
                .client
                .query()
                .table_name(&self.table)
                .index_name("due")
                .key_condition_expression("due_shard = :shard AND due_at <= :now")
                .expression_attribute_values(":shard", number(shard))
                .expression_attribute_values(":now", number(now.timestamp_millis()))
                .set_exclusive_start_key(start.clone())
                .limit(i32::try_from(limit).unwrap_or(i32::MAX));
            let page = query.send().await.map_err(unavailable)?;
            found.extend(page.items.unwrap_or_default().into_iter().map(|item| (shard, item)));
            // A megabyte ends a page as well; what its shard holds behind it comes with a later one.
            if let Some(end) = page.last_evaluated_key {
                ends.insert(shard, end);
            }
        }
        found.sort_by_key(|(_, item)| millis(item, "due_at"));
        let left = found.split_off(found.len().min(limit as usize));
        for (shard, item) in &found {
            shards.insert(*shard, Some(due_key(item)));
        }
        // A shard of which nothing is left over goes on where its own page ended, or has ended.
        shards.retain(|shard, start| {
            if left.iter().any(|(other, _)| other == shard) {
                return true;
            }
            *start = ends.remove(shard);
            start.is_some()
        });
        let found: Vec<Item> = found.into_iter().map(|(_, item)| item).collect();
        let next = (!shards.is_empty()).then_some(DuePosition(shards));
        Ok(Page { records: readable(&found), next })
    }

    async fn list(&self, caller: &str, before: Option<Uuid>, limit: u32) -> Result<Page<Job, Uuid>, Error> {
        let limit = limit as usize;
        let (mut found, mut start): (Vec<Item>, _) = (Vec::new(), None);
        loop {
            let query = self
                .client
                .query()
                .table_name(&self.table)
                .index_name("callers")
                .key_condition_expression("listed_by = :caller AND id < :before")
                .expression_attribute_values(":caller", text(caller))
                .expression_attribute_values(":before", text(before.unwrap_or(Uuid::max()).to_string()))
                .scan_index_forward(false)
                .set_exclusive_start_key(start)
                .limit(i32::try_from(limit + 1 - found.len()).unwrap_or(i32::MAX));
            let page = query.send().await.map_err(unavailable)?;
            found.extend(page.items.unwrap_or_default());
            start = page.last_evaluated_key;
            // A megabyte ends a page, and a few long answers are one. One more than asked for tells whether more follow.
            if start.is_none() || found.len() > limit {
                break;
            }
        }
        let follow = found.len() > limit;
        found.truncate(limit);
        let next = found.last().filter(|_| follow).and_then(|item| item.get("id")?.as_s().ok()?.parse().ok());
        Ok(Page { records: readable(&found).into_iter().filter_map(Record::into_job).collect(), next })
    }
}

/// Under which a write may happen.
struct Condition {
    expression: &'static str,
    values: Item,
    names_status: bool,
}

impl Condition {
    fn new_item() -> Self {
        Self { expression: "attribute_not_exists(id)", values: Item::new(), names_status: false }
    }

    /// The key is nobody's, or its item has expired and was not deleted yet.
    fn free_key(now: Timestamp) -> Self {
        let values = Item::from([(":now".to_owned(), number(now.timestamp_millis()))]);
        Self { expression: "attribute_not_exists(id) OR expires_at <= :now", values, names_status: false }
    }

    /// The record that `fence` names still stands.
    fn of(fence: Fence) -> Self {
        let mut values =
            Item::from([(":version".to_owned(), number(fence.version)), (":claim".to_owned(), number(fence.claim))]);
        let expression = match fence.status {
            Some(status) => {
                values.insert(":status".to_owned(), text(status.as_str()));
                "version = :version AND claim = :claim AND #status = :status"
            }
            None => "version = :version AND claim = :claim AND attribute_not_exists(#status)",
        };
        Self { expression, values, names_status: true }
    }
}

/// `status` is one of DynamoDB's reserved words.
fn names(condition: &Condition) -> Option<HashMap<String, String>> {
    condition.names_status.then(|| HashMap::from([("#status".to_owned(), "status".to_owned())]))
}

fn values(values: Item) -> Option<Item> {
    // An empty map is refused.
    (!values.is_empty()).then_some(values)
}

pub(super) fn text(value: impl Into<String>) -> AttributeValue {
    AttributeValue::S(value.into())
}

pub(super) fn number(value: impl ToString) -> AttributeValue {
    AttributeValue::N(value.to_string())
}

/// A record with the columns that conditions, indexes and the stream's filter name.
fn item(record: &Record) -> Result<Item, Error> {
    let (id, fence) = (record.id(), record.fence());
    let mut item = Item::from([
        ("id".to_owned(), text(id.to_string())),
        ("caller".to_owned(), text(record.caller())),
        ("version".to_owned(), number(fence.version)),
        ("claim".to_owned(), number(fence.claim)),
        ("record".to_owned(), text(serde_json::to_string(record).map_err(Error::internal)?)),
        ("write_id".to_owned(), text(Uuid::new_v4().to_string())),
    ]);
    let mut set = |name: &str, value: AttributeValue| drop(item.insert(name.to_owned(), value));
    match record.due_at() {
        Some(due_at) => {
            set("due_shard", number(id.as_u128() % DUE_SHARDS));
            set("due_at", number(due_at.timestamp_millis()));
        }
        // What is still due is swept before it may expire.
        None => set("ttl", number(record.expires_at().timestamp())),
    }
    if let Record::Job(job) = record {
        set("status", text(job.status.as_str()));
        set("listed_by", text(&job.caller));
        if let Some(dispatch) = job.dispatch {
            set("dispatch", text(Dispatch::as_str(dispatch)));
        }
    }
    Ok(item)
}

/// What names an item in the index of due records.
fn due_key(item: &Item) -> Item {
    let parts = ["id", "due_shard", "due_at"].into_iter();
    parts.filter_map(|name| Some((name.to_owned(), item.get(name)?.clone()))).collect()
}

/// With the caller's length, so that no two pairs share an id, whatever they hold.
fn key_id(caller: &str, key: &str) -> String {
    format!("key#{}#{caller}#{key}", caller.len())
}

fn idempotency_item(item: &Idempotency) -> Item {
    Item::from([
        ("id".to_owned(), text(key_id(&item.caller, &item.key))),
        ("fingerprint".to_owned(), text(&item.fingerprint)),
        ("job".to_owned(), text(item.id.to_string())),
        ("expires_at".to_owned(), number(item.expires_at.timestamp_millis())),
        ("ttl".to_owned(), number(item.expires_at.timestamp())),
    ])
}

fn read_idempotency(item: &Item, caller: &str, key: &str) -> Option<Idempotency> {
    Some(Idempotency {
        caller: caller.to_owned(),
        key: key.to_owned(),
        fingerprint: item.get("fingerprint")?.as_s().ok()?.clone(),
        id: Uuid::parse_str(item.get("job")?.as_s().ok()?).ok()?,
        expires_at: from_millis(millis(item, "expires_at")?),
    })
}

fn read(item: &Item) -> Result<Record, Error> {
    let json = item.get("record").and_then(|record| record.as_s().ok());
    let json = json.ok_or_else(|| Error::internal("an item without a record"))?;
    // serde's own message may repeat a value.
    serde_json::from_str(json)
        .map_err(|error| Error::internal(format!("{:?} at column {}", error.classify(), error.column())))
}

/// The records that this build can read; one that it cannot, after a rollback perhaps, must not
/// keep the others from being swept and listed.
fn readable(found: &[Item]) -> Vec<Record> {
    let read =
        |item: &Item| read(item).inspect_err(|error| tracing::error!(error.chain = error.chain(), "record not read"));
    found.iter().filter_map(|item| read(item).ok()).collect()
}

/// A number of milliseconds since the epoch.
pub(super) fn millis(item: &Item, name: &str) -> Option<i64> {
    item.get(name)?.as_n().ok()?.parse().ok()
}

fn unavailable(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::unavailable(WHAT, error)
}
