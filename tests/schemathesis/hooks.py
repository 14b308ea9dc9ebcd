"""What Schemathesis cannot know of the hosts; it loads this, and run.py says the rest in the environment."""

import atexit
import collections
import json
import os

import schemathesis
from hypothesis import strategies
from schemathesis.openapi.checks import RejectedPositiveData

KEYED = bool(os.environ["KEYED"])
OWN_KEYS = os.environ["OWN_KEYS"].split()
REVOCABLE_KEY = os.environ["REVOCABLE_KEY"]
PHOTO = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNoAAAAggCB2kUIOwAAAABJRU5ErkJggg=="
COMPLETION = {"model": "text", "messages": [{"role": "user", "content": "What is a naevus?"}]}
# `contains` would say it, which utoipa does not write.
NO_USER = ("invalid_request", 'holds nothing of the role "user"')
# What a request may be refused for though it is as described, since no schema can say it: code and words.
BEYOND_SCHEMAS = {
    "POST /chat": [NO_USER],
    # A date passes.
    "POST /admin/keys": [("invalid_request", '"expires_at" has passed')],
    "POST /submit": [
        NO_USER,
        # Text that fits the schema of a photo is still no photo.
        ("unsupported_media_type", ""),
        ("photo_unreadable", ""),
        # Nobody is called back by these hosts.
        ("callback_not_allowed", ""),
        # A description's parameters go with every content type.
        ("invalid_request", "Only raw bodies take query parameters"),
    ],
}
answers = collections.defaultdict(set)


@schemathesis.hook
def before_load_schema(context, raw_schema):
    # One description for all hosts says that credentials may be left out. Not here, and `ignored_auth` is to see to it.
    if KEYED:
        raw_schema["security"].remove({})


@schemathesis.hook.apply_to(operation_id="completions")
def before_add_examples(context, examples):
    for more in ({}, {"stream": True}):
        examples.append(context.operation.Case(body=COMPLETION | more, media_type="application/json"))


@schemathesis.hook("flatmap_case").apply_to(operation_id="completions")
def ask_a_model_that_is_there(context, case):
    # Any object is as described, and hardly one names a model. Without messages it is LiteLLM that refuses.
    if is_negative(case):
        return strategies.just(case)
    more = [{}, {"model": COMPLETION["model"]}, COMPLETION, COMPLETION | {"stream": True}]
    return strategies.sampled_from(more).map(lambda fields: changed(case, body=case.body | fields))


@schemathesis.hook("flatmap_case").apply_to(operation_id="submit")
def send_a_photo_that_is_one(context, case):
    # Hardly anything that is as described is taken, and there would be few jobs to go on with.
    if is_negative(case):
        return strategies.just(case)
    headers = {name: value for name, value in case.headers.items() if name != "Idempotency-Key"}
    photo = {"body": {"image": PHOTO}, "media_type": "application/json", "query": {}, "headers": headers}
    return strategies.sampled_from([{}, photo]).map(lambda parts: changed(case, **parts))


def is_negative(case):
    return case.meta.generation.mode.is_negative


def changed(case, **parts):
    for name, value in parts.items():
        setattr(case, name, value)
    return case


@schemathesis.hook
def map_body(context, body):
    # JSON Schema counts 2.0 among the integers; the hosts do not.
    return whole(body)


def whole(value):
    if isinstance(value, dict):
        return {name: whole(part) for name, part in value.items()}
    if isinstance(value, list):
        return [whole(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@schemathesis.hook.apply_to(operation_id="revoke_key")
def before_call(context, case, kwargs):
    # The keys that are asked with are listed like all others. Once they are revoked there is nothing to be found.
    if case.path_parameters.get("id") in OWN_KEYS:
        case.path_parameters["id"] = REVOCABLE_KEY


@schemathesis.hook
def filter_failure(context, failure, case, response):
    # The tool counts what is dropped here.
    if not isinstance(failure, RejectedPositiveData):
        return True
    error = response.json()["error"]
    # What a model's server refuses, in its own words, is its own affair.
    if case.operation.label == "POST /v1/chat/completions" and "request_id" not in error:
        return False
    beyond = BEYOND_SCHEMAS.get(case.operation.label, [])
    return not any(error["code"] == code and words in error["message"] for code, words in beyond)


@schemathesis.hook
def after_call(context, case, response):
    answers[case.operation.label].add(response.status_code)


@atexit.register
def write_answers():
    with open(os.environ["ANSWERS"], "w") as file:
        json.dump({operation: sorted(statuses) for operation, statuses in answers.items()}, file)
