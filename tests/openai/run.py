"""Starts LiteLLM, misbehaving model servers and the host, runs the clients, and stops what it started.

Started by scripts/openai-clients with the folder of the Node client. Each process is stopped by its id.
"""

import contextlib
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

DEBUG = ROOT / "target" / "debug"


def admin(url, key, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    request = urllib.request.Request(f"{url}/admin/keys{path}", data, headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def settled(url, key, key_id):
    """The one month's ledger of a key once nothing is under way."""
    for _ in range(100):
        usage = admin(url, key, f"/{key_id}/usage")
        if usage["under_way"] == 0:
            return usage["months"][0]
        time.sleep(0.2)
    sys.exit("a request is still under way")


def models(litellm, misbehaving):
    real = {"base_url": f"{litellm}/v1", "api_key_name": "LITELLM_KEY", "prompt_usd_per_million": 1, "completion_usd_per_million": 10}
    table = {name: {**real, "model": name} for name in ("text", "json", "tools")}
    for name, url in misbehaving.items():
        table[name] = {"base_url": url, "timeout_seconds": 3}
    table["stalls"]["timeout_seconds"] = 30
    table["stands-in"] = {"base_url": misbehaving["down"], "fallback": "text"}
    return {"models": table}


def drive(url, admin_key, node_modules):
    for client in ("python", "node"):
        made = admin(url, admin_key, "", {"caller": client, "budget_usd_per_month": 1})
        few = admin(url, admin_key, "", {"caller": client, "requests_per_minute": 2, "models": ["text"]})
        six = admin(url, admin_key, "", {"caller": client, "requests_per_minute": 6})
        # Used up by one request.
        poor = admin(url, admin_key, "", {"caller": client, "budget_usd_per_month": 0.000001})
        command = [sys.executable, HERE / "drive.py"] if client == "python" else ["node", HERE / "drive.mjs"]
        environment = os.environ | {
            "PROXY_URL": f"{url}/v1",
            "PROXY_KEY": made["key"],
            "FEW_KEY": few["key"],
            "SIX_KEY": six["key"],
            "POOR_KEY": poor["key"],
            "OPENAI_NODE": node_modules,
        }
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=300)
        print(done.stdout, end="", flush=True)
        if done.returncode != 0:
            sys.exit(f"the client for {client} ended with {done.returncode}")
        seen = json.loads(done.stdout.splitlines()[-1])
        month = settled(url, admin_key, made["id"])
        exact = month["prompt_tokens"] + month["completion_tokens"] - month["estimated_tokens"]
        if exact != seen["tokens"] or month["estimated_requests"] < seen["left"]:
            sys.exit(f"the ledger says {month}, the client has seen {seen}")
        print(f"{client}: the ledger agrees: {month}", flush=True)


def main(node_modules):
    with contextlib.ExitStack() as stack:
        scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        log = stack.enter_context(open(scratch / "log", "w+b"))
        url, key = stack.enter_context(litellm(pathlib.Path(sys.executable).parent, log))
        badly = stack.enter_context(
            running([DEBUG / "examples" / "misbehaving-llms"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        misbehaving = json.loads(badly.stdout.readline())
        (scratch / "models.json").write_text(json.dumps(models(url, misbehaving)))
        environment = os.environ | {
            "DATA_DIR": str(scratch / "data"),
            "MODEL_DIR": str(ROOT / "model"),
            "LISTEN_ADDR": "127.0.0.1:0",
            "LLM_MODELS_FILE": str(scratch / "models.json"),
            "LITELLM_KEY": key,
            "REQUESTS_PER_MINUTE": "100000",
        }
        admin_key = subprocess.run([DEBUG / "local", "init"], env=environment, stdout=subprocess.PIPE, stderr=log, check=True, text=True)
        host = stack.enter_context(running([DEBUG / "local", "serve"], env=environment, stdout=subprocess.PIPE, stderr=log, text=True))
        line = host.stdout.readline().split()
        if not line:
            log.seek(0)
            sys.exit(log.read().decode())
        drive(line[-1], admin_key.stdout.strip(), node_modules)
        log.seek(0)
        if key.encode() in (text := log.read()) or b"pigment" in text:
            sys.exit("a key or an answer is in a log")


main(sys.argv[1])
