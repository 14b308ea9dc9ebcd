"""Starts LiteLLM and hosts of the debug build, holds each to its own description, and stops what it started.

Started by scripts/schemathesis with the folder of LiteLLM's programs, the number of examples for each operation, and
options of Schemathesis. Each process is stopped by its id.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import urllib.request

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

from servers import litellm, running

LOCAL = ROOT / "target" / "debug" / "local"
SAMPLES = sorted((ROOT / "model" / "samples").glob("*.png"))
# What answers nobody with success where there is no LLM: nothing fails there that might be sent round again.
NEEDS_LLM = {
    "POST /admin/jobs/{request_id}/redrive",
    "POST /chat",
    "POST /v1/chat/completions",
    "GET /v1/models/{model}",
}


@dataclasses.dataclass
class Host:
    url: str
    # By who asks with them; none on a host that demands none.
    keys: dict[str, str]
    # A key that nobody asks with.
    revocable: str = ""
    # What is there to be asked for, by the names in schemathesis.toml.
    ids: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def ask(self, path, body=None, content_type="application/json", who="admin"):
        headers = {"authorization": f"Bearer {self.keys[who]}"} if self.keys else {}
        if body is not None:
            headers["content-type"] = content_type
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, body, headers), timeout=60) as answer:
            return json.load(answer)

    def fill(self, answers):
        """Photos that were read; where an LLM answers, prompts that failed and may be sent round again; and keys."""
        photos = [self.ask("/submit", photo.read_bytes(), "image/png")["request_id"] for photo in SAMPLES * 4]
        # What LiteLLM makes up is no JSON.
        asked = {"prompt": "What is a naevus?", "format": "json"}
        prompts = [self.ask("/submit", asked)["request_id"] for _ in range(8 if answers else 0)]
        for job in photos + prompts:
            self.ask(f"/result/{job}?wait=25")
        self.revocable = self.ask("/admin/keys", {"caller": "ward-3"})["id"]
        if self.keys:
            self.keys["ward-3"] = self.ask("/admin/keys", {"caller": "ward-3", "scopes": ["jobs"]})["key"]
        self.ids = {"jobs": photos, "failed": prompts or photos, "keys": [self.revocable, *self.own()]}

    def own(self):
        return [key.split("_")[1] for key in self.keys.values()]


@contextlib.contextmanager
def host(folder, settings, keyed=False):
    environment = os.environ | settings | {
        "DATA_DIR": str(folder / "data"),
        "MODEL_DIR": str(ROOT / "model"),
        "LISTEN_ADDR": "127.0.0.1:0",
        "LOG_LEVEL": "warn",
        "REQUESTS_PER_MINUTE": "1000000",
    }
    keys = {}
    with open(folder / "log", "w") as log:
        options = {"env": environment, "stdout": subprocess.PIPE, "stderr": log, "text": True}
        if keyed:
            keys["admin"] = subprocess.run([LOCAL, "init"], check=True, **options).stdout.strip()
        with running([LOCAL, "serve"], **options) as process:
            line = process.stdout.readline().split()
            if line:
                host = Host(line[-1], keys)
                host.fill(answers=bool(settings))
                yield host
    logged = (folder / "log").read_text().splitlines()
    if not line:
        sys.exit("\n".join(logged))
    if errors := [entry for entry in logged if '"ERROR"' in entry]:
        sys.exit("\n".join(["the host logged errors:", *errors[:5]]))


def config(host, folder, anonymous):
    """The settings beside this file, what is there to be asked for, and who asks."""
    text = (HERE / "schemathesis.toml").read_text()
    text += "".join(f"\n[dictionaries.{name}]\nvalues = {json.dumps(ids)}\n" for name, ids in host.ids.items())
    if host.keys and not anonymous:
        header = {name: {"name": "Authorization", "value": f"Bearer {key}"} for name, key in host.keys.items()}
        users = [{"name": name, "fixedHeaders": [header[name]]} for name in host.keys]
        (folder / "users.json").write_text(json.dumps({"auth": users}))
        # The admin asks. What it reads of its own is asked for by the others as well, who must not get it.
        peers = json.dumps(list(host.keys))
        text += f'\n[auth.wfc]\npath = "{folder}/users.json"\nuser = "admin"\npeers = {peers}\n'
    (folder / "schemathesis.toml").write_text(text)
    return folder / "schemathesis.toml"


def hold(host, folder, options, answering=lambda names: names, anonymous=False):
    """Runs Schemathesis; those of all operations that are `answering`, and no others, must answer with success once."""
    environment = os.environ | {
        "SCHEMATHESIS_HOOKS": str(HERE / "hooks.py"),
        "ANSWERS": str(folder / "answers.json"),
        "KEYED": "yes" if host.keys else "",
        "OWN_KEYS": " ".join(host.own()),
        "REVOCABLE_KEY": host.revocable,
    }
    st = pathlib.Path(sys.executable).parent / "st"
    command = [st, "--config-file", config(host, folder, anonymous), "run", f"{host.url}/openapi.json", *options]
    # In a folder of its own: what another host has failed at is not tried again.
    done = subprocess.run(command, cwd=folder, env=environment)
    answers = json.loads((folder / "answers.json").read_text())
    succeeded = {name for name, statuses in answers.items() if any(200 <= status < 300 for status in statuses)}
    odd = succeeded ^ answering(answers.keys())
    print(f"{len(succeeded)} of {len(answers)} operations have answered with success", flush=True)
    if odd:
        print(f"scripts/schemathesis: not as expected: {', '.join(sorted(odd))}", file=sys.stderr, flush=True)
    return done.returncode == 0 and not odd


def main(programs, examples, *more):
    options = ["--max-examples", examples, "--seed", "1", "--no-color", "--suppress-health-check", "all"]
    # The keys are those of hosts that are gone, and a request can be repeated only with all of it.
    options += ["--output-sanitize", "false", *more]
    fine = True
    with contextlib.ExitStack() as stack:
        scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def step(folder, title):
            print(f"\n-- {title} ({time.monotonic() - started:.0f} s)", flush=True)
            (scratch / folder).mkdir()
            return scratch / folder

        started = time.monotonic()
        folder = step("bare", "a host without an LLM and without keys")
        with host(folder, {}) as bare:
            fine &= hold(bare, folder, options, lambda names: names - NEEDS_LLM)

        log = stack.enter_context(open(scratch / "litellm", "w"))
        url, key = stack.enter_context(litellm(programs, log))
        llm = {"LLM_BASE_URL": f"{url}/v1", "LLM_MODEL": "text", "LLM_API_KEY": key}
        folder = step("llm", "a host with an LLM")
        with host(folder, llm) as answering:
            fine &= hold(answering, folder, options)

        folder = step("keys", "a host with an LLM and keys, asked by an admin")
        with host(folder, llm, keyed=True) as locked:
            fine &= hold(locked, folder, options)
            # With a key that was revoked on the way everything is refused and nothing found; that is an error here.
            for who in locked.keys:
                locked.ask("/results", who=who)
            folder = step("nobody", "the same host, asked without a key")
            fine &= hold(locked, folder, options, lambda names: {"GET /healthz"}, anonymous=True)
        print(f"\n{time.monotonic() - started:.0f} s")
    if not fine:
        sys.exit("scripts/schemathesis: something was found; see above")


main(*sys.argv[1:])
