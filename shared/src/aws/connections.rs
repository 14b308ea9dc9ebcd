//! Tickets, open WebSockets and their subscriptions in one DynamoDB table, without a stream. All of
//! it expires: who is gone without a word leaves nothing behind for longer than a connection lasts.
//!
//! | item | `id` | `part` | beside it |
//! | --- | --- | --- | --- |
//! | ticket | `ticket#<sha256>` | `ticket` | identity as JSON, `expires_at` |
//! | connection | `connection#<id>` | `connection` | identity as JSON, `expires_at`, `jobs` |
//! | subscription | `job#<id>` | the connection | `caller` |

use aws_config::SdkConfig;
use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::error::SdkError;
use aws_sdk_dynamodb::operation::transact_write_items::TransactWriteItemsError;
use aws_sdk_dynamodb::types::{AttributeValue, Put, ReturnValue, TransactWriteItem, Update};
use uuid::Uuid;

use super::dynamodb::{Item, MAX_TRIES, conflict_pause, millis, number, text};
use crate::auth::Identity;
use crate::clock::{Timestamp, from_millis};
use crate::error::Error;
use crate::ports::{Connection, Connections, Subscribed, Ticket};
use crate::push::{MAX_SUBSCRIPTIONS, Subscriber};

const WHAT: &str = "the store of connections";
const TICKET: &str = "ticket";
const CONNECTION: &str = "connection";

/// Connections in one table.
#[derive(Debug, Clone)]
pub struct DynamoConnections {
    client: Client,
    table: String,
}

impl DynamoConnections {
    #[must_use]
    pub fn new(config: &SdkConfig, table: String) -> Self {
        Self { client: Client::new(config), table }
    }

    async fn put(&self, (id, part): (String, &str), identity: &Identity, expires_at: Timestamp) -> Result<(), Error> {
        let identity = serde_json::to_string(identity).map_err(Error::internal)?;
        let put = self
            .client
            .put_item()
            .table_name(&self.table)
            .item("id", text(id))
            .item("part", text(part))
            .item("identity", text(identity))
            .item("expires_at", number(expires_at.timestamp_millis()))
            .item("ttl", number(expires_at.timestamp()));
        put.send().await.map(|_| ()).map_err(unavailable)
    }

    /// Deletes an item; gives it as it was, where it was there.
    async fn take(&self, id: String, part: &str) -> Result<Option<Item>, Error> {
        let delete = self.client.delete_item().table_name(&self.table).key("id", text(id)).key("part", text(part));
        Ok(delete.return_values(ReturnValue::AllOld).send().await.map_err(unavailable)?.attributes)
    }

    fn subscription(&self, connection: &Connection, job: Uuid) -> Result<[TransactWriteItem; 2], Error> {
        let update = Update::builder()
            .table_name(&self.table)
            .key("id", text(connection_id(&connection.id)))
            .key("part", text(CONNECTION))
            .update_expression("ADD jobs :job")
            // A set cannot be counted before it is there.
            .condition_expression(
                "attribute_exists(id) AND (attribute_not_exists(jobs) OR contains(jobs, :id) OR size(jobs) < :most)",
            )
            .expression_attribute_values(":job", AttributeValue::Ss(vec![job.to_string()]))
            .expression_attribute_values(":id", text(job.to_string()))
            .expression_attribute_values(":most", number(MAX_SUBSCRIPTIONS as i64))
            .build()
            .map_err(Error::internal)?;
        let put = Put::builder()
            .table_name(&self.table)
            .item("id", text(job_id(job)))
            .item("part", text(&connection.id))
            .item("caller", text(&connection.identity.caller))
            .item("ttl", number(connection.expires_at.timestamp()))
            .build()
            .map_err(Error::internal)?;
        Ok([TransactWriteItem::builder().update(update).build(), TransactWriteItem::builder().put(put).build()])
    }
}

impl Connections for DynamoConnections {
    async fn put_ticket(&self, ticket: &Ticket) -> Result<(), Error> {
        self.put((ticket_id(&ticket.sha256), TICKET), &ticket.identity, ticket.expires_at).await
    }

    async fn take_ticket(&self, sha256: &str, now: Timestamp) -> Result<Option<Ticket>, Error> {
        // Of two deletes one finds it. One whose answer was lost is asked for anew by the client.
        let Some(item) = self.take(ticket_id(sha256), TICKET).await? else { return Ok(None) };
        let (identity, expires_at) = read(&item)?;
        let ticket = Ticket { sha256: sha256.to_owned(), identity, expires_at };
        Ok(Some(ticket).filter(|ticket| now < ticket.expires_at))
    }

    async fn open(&self, connection: &Connection) -> Result<(), Error> {
        self.put((connection_id(&connection.id), CONNECTION), &connection.identity, connection.expires_at).await
    }

    async fn find(&self, id: &str) -> Result<Option<Connection>, Error> {
        let get = self.client.get_item().table_name(&self.table).consistent_read(true);
        let get = get.key("id", text(connection_id(id))).key("part", text(CONNECTION));
        let Some(item) = get.send().await.map_err(unavailable)?.item else { return Ok(None) };
        let (identity, expires_at) = read(&item)?;
        Ok(Some(Connection { id: id.to_owned(), identity, expires_at }))
    }

    async fn subscribe(&self, connection: &Connection, job: Uuid) -> Result<Subscribed, Error> {
        for attempt in 0..MAX_TRIES {
            let items = self.subscription(connection, job)?;
            let error = match self.client.transact_write_items().set_transact_items(Some(items.into())).send().await {
                Ok(_) => return Ok(Subscribed::Done),
                Err(error) => error,
            };
            match error.as_service_error() {
                Some(TransactWriteItemsError::TransactionCanceledException(canceled)) => {
                    let reasons = canceled.cancellation_reasons();
                    if reasons.iter().any(|reason| reason.code() == Some("ConditionalCheckFailed")) {
                        let is_open = self.find(&connection.id).await?.is_some();
                        return Ok(if is_open { Subscribed::TooMany } else { Subscribed::Gone });
                    }
                    if !reasons.iter().any(|reason| reason.code() == Some("TransactionConflict")) {
                        return Err(unavailable(error));
                    }
                    // A client that comes again subscribes to all that it waits for at once.
                    conflict_pause(attempt).await;
                }
                _ => return Err(unavailable(error)),
            }
        }
        Err(Error::unavailable(WHAT, "a transaction kept meeting others"))
    }

    async fn subscribers(&self, job: Uuid) -> Result<Vec<Subscriber>, Error> {
        let mut pages = self
            .client
            .query()
            .table_name(&self.table)
            .consistent_read(true)
            .key_condition_expression("id = :id")
            .expression_attribute_values(":id", text(job_id(job)))
            .into_paginator()
            .items()
            .send();
        let mut subscribers = Vec::new();
        while let Some(item) = pages.next().await {
            let item = item.map_err(unavailable)?;
            subscribers.push(Subscriber { caller: string(&item, "caller")?, connection: string(&item, "part")? });
        }
        Ok(subscribers)
    }

    async fn close(&self, id: &str) -> Result<(), Error> {
        // The connection last: cut off before that, the next close finds what is left. What was subscribed to in
        // the meantime is in what is deleted.
        let get = self.client.get_item().table_name(&self.table).consistent_read(true);
        let get = get.key("id", text(connection_id(id))).key("part", text(CONNECTION));
        let Some(item) = get.send().await.map_err(unavailable)?.item else { return Ok(()) };
        for job in jobs(&item) {
            self.take(format!("job#{job}"), id).await?;
        }
        let Some(last) = self.take(connection_id(id), CONNECTION).await? else { return Ok(()) };
        for job in jobs(&last).filter(|job| jobs(&item).all(|known| known != *job)) {
            self.take(format!("job#{job}"), id).await?;
        }
        Ok(())
    }
}

fn jobs(item: &Item) -> impl Iterator<Item = &String> {
    item.get("jobs").and_then(|jobs| jobs.as_ss().ok()).into_iter().flatten()
}

fn ticket_id(sha256: &str) -> String {
    format!("ticket#{sha256}")
}

fn connection_id(id: &str) -> String {
    format!("connection#{id}")
}

fn job_id(id: Uuid) -> String {
    format!("job#{id}")
}

fn read(item: &Item) -> Result<(Identity, Timestamp), Error> {
    let identity = serde_json::from_str(&string(item, "identity")?).map_err(Error::internal)?;
    let expires_at = millis(item, "expires_at").ok_or_else(|| Error::internal("an item without an end"))?;
    Ok((identity, from_millis(expires_at)))
}

fn string(item: &Item, name: &str) -> Result<String, Error> {
    let value = item.get(name).and_then(|value| value.as_s().ok());
    value.cloned().ok_or_else(|| Error::internal("an item of a connection that cannot be read"))
}

fn unavailable<E, R>(error: SdkError<E, R>) -> Error
where
    SdkError<E, R>: std::error::Error + Send + Sync + 'static,
{
    Error::unavailable(WHAT, error)
}
