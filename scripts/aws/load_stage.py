"""Puts what Terraform does not hold into a stage: the model bundle and the secret.

    python load_stage.py BUCKET SECRET_ARN [NAME...]

The secret's cache key and the key of webhooks are made once and then kept. LLM_API_KEY, and the key of each NAME that a
model goes by, is put in where the environment has it.
Credentials, region and AWS_ENDPOINT_URL are those of the AWS SDK.
"""

import base64
import hashlib
import json
import os
import pathlib
import secrets
import sys

import botocore.session
from botocore.config import Config

MODEL = pathlib.Path(__file__).resolve().parents[2] / "model"


def upload_model(s3, bucket):
    manifest = (MODEL / "manifest.json").read_bytes()
    prefix = f"models/{hashlib.sha256(manifest).hexdigest()}"
    network = json.loads(manifest)["network"]["file"]
    # The manifest last: where it is, the bundle is whole.
    for name in (network, "manifest.json"):
        s3.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=(MODEL / name).read_bytes())


def fill_secret(manager, arn, names):
    """Those of the names that the secret has no key for."""
    try:
        kept = json.loads(manager.get_secret_value(SecretId=arn).get("SecretString", "{}"))
    except manager.exceptions.ResourceNotFoundException:
        kept = {}  # It has no value yet.
    webhook_secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
    values = {"CACHE_KEY": secrets.token_hex(32), "WEBHOOK_SECRET": webhook_secret} | kept
    values |= {name: os.environ[name] for name in names if os.environ.get(name)}
    if values != kept:
        manager.put_secret_value(SecretId=arn, SecretString=json.dumps(values))
    return [name for name in names if name not in values]


def main():
    bucket, arn, *names = sys.argv[1:]
    session = botocore.session.get_session()
    # An emulator's buckets have no names of their own.
    style = {"addressing_style": "path" if "AWS_ENDPOINT_URL" in os.environ else "auto"}
    upload_model(session.create_client("s3", config=Config(s3=style)), bucket)
    names = dict.fromkeys(["LLM_API_KEY", *names])
    for name in fill_secret(session.create_client("secretsmanager"), arn, names):
        print(f"The secret has no {name}. Where the stage's LLM wants one, set it so, with the stage's name:")
        print(f"  read -rs {name} && export {name} && scripts/deploy STAGE")


main()
