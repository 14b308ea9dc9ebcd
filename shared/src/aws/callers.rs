//! API keys and the counts of requests in one DynamoDB table, apart from the jobs': counting must
//! not pass through their stream.
//!
//! | item | `id` | beside it |
//! | --- | --- | --- |
//! | API key | `key#<id>` | the key as JSON, `revoked_at`, and `listed` with `created_at` for the index `keys` |
//! | account of one key | `account#<id>` | the account as JSON, `version`, `write_id` |
//! | requests of one caller in one window | `requests#<window>#<caller>` | `count`, `ttl` |

use aws_config::SdkConfig;
use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::error::SdkError;
use aws_sdk_dynamodb::operation::put_item::PutItemError;
use aws_sdk_dynamodb::operation::update_item::UpdateItemError;
use aws_sdk_dynamodb::types::{AttributeValue, ReturnValue, ReturnValuesOnConditionCheckFailure};
use uuid::Uuid;

use super::dynamodb::{Item, millis, number, text};
use crate::account::Account;
use crate::api::admin::KeyInfo;
use crate::auth::WINDOW_SECONDS;
use crate::auth::keys::ApiKey;
use crate::clock::{Timestamp, from_millis};
use crate::error::Error;
use crate::ports::Callers;

const WHAT: &str = "the key store";
/// The one partition of the index: there are as many keys as callers.
const LISTED: &str = "key";

/// Callers in one table.
#[derive(Debug, Clone)]
pub struct DynamoCallers {
    client: Client,
    table: String,
}

impl DynamoCallers {
    #[must_use]
    pub fn new(config: &SdkConfig, table: String) -> Self {
        Self { client: Client::new(config), table }
    }
}

impl Callers for DynamoCallers {
    async fn create_key(&self, key: &ApiKey) -> Result<bool, Error> {
        let info = serde_json::to_string(&key.info).map_err(Error::internal)?;
        let put = self
            .client
            .put_item()
            .table_name(&self.table)
            .item("id", text(key_id(&key.info.id)))
            .item("listed", text(LISTED))
            .item("created_at", number(key.info.created_at.timestamp_millis()))
            .item("secret_sha256", AttributeValue::B(key.secret_sha256.clone().into()))
            .item("info", text(info))
            .condition_expression("attribute_not_exists(id)");
        match put.send().await {
            Ok(_) => Ok(true),
            Err(error) if error.as_service_error().is_some_and(PutItemError::is_conditional_check_failed_exception) => {
                // Ours where the answer was lost and the SDK has asked once more.
                Ok(self.find_key(&key.info.id).await?.is_some_and(|found| found.secret_sha256 == key.secret_sha256))
            }
            Err(error) => Err(unavailable(error)),
        }
    }

    async fn find_key(&self, id: &str) -> Result<Option<ApiKey>, Error> {
        let get = self.client.get_item().table_name(&self.table).key("id", text(key_id(id))).consistent_read(true);
        let found = get.send().await.map_err(unavailable)?.item;
        found.map(|item| read(&item)).transpose()
    }

    async fn keys(&self) -> Result<Vec<ApiKey>, Error> {
        let mut pages = self
            .client
            .query()
            .table_name(&self.table)
            .index_name("keys")
            .key_condition_expression("listed = :listed")
            .expression_attribute_values(":listed", text(LISTED))
            .into_paginator()
            .items()
            .send();
        let mut keys = Vec::new();
        while let Some(item) = pages.next().await {
            keys.push(read(&item.map_err(unavailable)?)?);
        }
        keys.sort_by(|a, b| (a.info.created_at, &a.info.id).cmp(&(b.info.created_at, &b.info.id)));
        Ok(keys)
    }

    async fn revoke_key(&self, id: &str, now: Timestamp) -> Result<bool, Error> {
        let update = self
            .client
            .update_item()
            .table_name(&self.table)
            .key("id", text(key_id(id)))
            .update_expression("SET revoked_at = if_not_exists(revoked_at, :now)")
            .condition_expression("attribute_exists(id)")
            .expression_attribute_values(":now", number(now.timestamp_millis()));
        match update.send().await {
            Ok(_) => Ok(true),
            Err(error)
                if error.as_service_error().is_some_and(UpdateItemError::is_conditional_check_failed_exception) =>
            {
                Ok(false)
            }
            Err(error) => Err(unavailable(error)),
        }
    }

    async fn find_account(&self, key_id: &str) -> Result<Account, Error> {
        let get = self.client.get_item().table_name(&self.table).key("id", text(account_id(key_id)));
        let Some(item) = get.consistent_read(true).send().await.map_err(unavailable)?.item else {
            return Ok(Account::default());
        };
        let account = item.get("account").and_then(|account| account.as_s().ok());
        let account = account.and_then(|account| serde_json::from_str(account).ok());
        account.ok_or_else(|| Error::internal("an account that cannot be read"))
    }

    async fn replace_account(&self, key_id: &str, version: u64, after: &Account) -> Result<bool, Error> {
        let account = serde_json::to_string(after).map_err(Error::internal)?;
        let write_id = Uuid::new_v4().to_string();
        let put = self
            .client
            .put_item()
            .table_name(&self.table)
            .item("id", text(account_id(key_id)))
            .item("account", text(account))
            .item("version", AttributeValue::N(after.version.to_string()))
            .item("write_id", text(write_id.clone()))
            .return_values_on_condition_check_failure(ReturnValuesOnConditionCheckFailure::AllOld);
        let put = match version {
            0 => put.condition_expression("attribute_not_exists(id)"),
            _ => put
                .condition_expression("version = :version")
                .expression_attribute_values(":version", AttributeValue::N(version.to_string())),
        };
        match put.send().await.map_err(SdkError::into_service_error) {
            Ok(_) => Ok(true),
            Err(PutItemError::ConditionalCheckFailedException(failed)) => {
                // Ours where the answer was lost and the SDK has asked once more.
                let found = failed.item().and_then(|item| item.get("write_id")?.as_s().ok());
                Ok(found == Some(&write_id))
            }
            Err(error) => Err(unavailable(error)),
        }
    }

    async fn count_request(&self, caller: &str, window: i64) -> Result<u32, Error> {
        let update = self
            .client
            .update_item()
            .table_name(&self.table)
            .key("id", text(format!("requests#{window}#{caller}")))
            // `count` and `ttl` are reserved words.
            .update_expression("ADD #count :one SET #ttl = :ttl")
            .expression_attribute_names("#count", "count")
            .expression_attribute_names("#ttl", "ttl")
            .expression_attribute_values(":one", number(1))
            .expression_attribute_values(":ttl", number((window + 2) * WINDOW_SECONDS))
            .return_values(ReturnValue::UpdatedNew);
        let updated = update.send().await.map_err(unavailable)?;
        let count = updated.attributes().and_then(|item| item.get("count")?.as_n().ok()?.parse().ok());
        count.ok_or_else(|| Error::internal("a count that is no number"))
    }
}

fn account_id(key_id: &str) -> String {
    format!("account#{key_id}")
}

fn key_id(id: &str) -> String {
    format!("key#{id}")
}

fn read(item: &Item) -> Result<ApiKey, Error> {
    let unreadable = || Error::internal("a key without its parts");
    let info = item.get("info").and_then(|info| info.as_s().ok()).ok_or_else(unreadable)?;
    let mut info: KeyInfo = serde_json::from_str(info).map_err(|_| unreadable())?;
    info.revoked_at = millis(item, "revoked_at").map(from_millis);
    let secret = item.get("secret_sha256").and_then(|secret| secret.as_b().ok()).ok_or_else(unreadable)?;
    Ok(ApiKey { info, secret_sha256: secret.as_ref().to_vec() })
}

fn unavailable(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::unavailable(WHAT, error)
}
