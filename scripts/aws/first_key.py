"""Makes the first admin key of a stage and prints it, once; prints nothing where there are keys already.

    python first_key.py CALLERS_TABLE_NAME [--another]

--another makes a further one, for who has lost theirs. The item is as shared/src/aws/callers.rs reads
it: the key's secret is stored as its hash. Credentials, region and AWS_ENDPOINT_URL are those of the AWS
SDK; whoever may write the table may have a key anyway.
"""

import datetime
import hashlib
import json
import secrets
import sys

import botocore.session


def has_keys(table, name):
    found = table.query(
        TableName=name, IndexName="keys", Limit=1, KeyConditionExpression="listed = :listed",
        ExpressionAttributeValues={":listed": {"S": "key"}},
    )
    return bool(found["Items"])


def make_key(table, name):
    key_id, secret = secrets.token_hex(6), secrets.token_hex(32)
    now = datetime.datetime.now(datetime.timezone.utc)
    info = {
        "id": key_id, "caller": "operator", "name": "made by the deployment", "scopes": ["admin", "jobs"],
        "created_at": now.isoformat(timespec="milliseconds"), "expires_at": None, "revoked_at": None,
    }
    table.put_item(
        TableName=name,
        Item={
            "id": {"S": f"key#{key_id}"},
            "listed": {"S": "key"},
            "created_at": {"N": str(int(now.timestamp() * 1000))},
            "secret_sha256": {"B": hashlib.sha256(secret.encode()).digest()},
            "info": {"S": json.dumps(info)},
        },
        ConditionExpression="attribute_not_exists(id)",
    )
    return f"lesion_{key_id}_{secret}"


def main():
    name, *options = sys.argv[1:]
    table = botocore.session.get_session().create_client("dynamodb")
    if options == ["--another"] or not has_keys(table, name):
        print(make_key(table, name))


main()
