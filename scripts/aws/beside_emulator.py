"""scripts/emulator, once Python and MiniStack are there: emulator, Terraform, command, and the end."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = ROOT / "scripts" / "aws"
# Applying takes two minutes. Once in a while MiniStack leaves a request without an answer.
STALLED_SECONDS = 300
NAMES = {
    "API_URL": "api_url",
    "CHAT_URL": "chat_url",
    "TABLE_NAME": "table_name",
    "CALLERS_TABLE_NAME": "callers_table_name",
    "CONNECTIONS_TABLE_NAME": "connections_table_name",
    "QUEUE_URL": "queue_url",
    "DEAD_LETTER_QUEUE_URL": "dead_letter_queue_url",
    "PROMPT_QUEUE_URL": "prompt_queue_url",
    "WEBHOOK_QUEUE_URL": "webhook_queue_url",
    "WEBHOOK_DEAD_LETTER_QUEUE_URL": "webhook_dead_letter_queue_url",
    "BUCKET": "bucket_name",
    "SECRET_ARN": "secret_arn",
}


def fail(problem):
    raise SystemExit(f"scripts/emulator: {problem}")


@contextlib.contextmanager
def child(command, **options):
    """A process in a group of its own, which is ended with everything that it started."""
    process = subprocess.Popen(command, process_group=0, **options)
    try:
        yield process
    finally:
        for sign, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def emulator(scratch, log_path):
    """The emulator's address, for as long as the block lasts."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # Nothing of the caller's environment: functions inherit it, and shall see what Terraform gives them.
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(scratch), "TMPDIR": str(scratch), "STATE_DIR": str(scratch),
        "GATEWAY_PORT": str(port), "BIND_HOST": "127.0.0.1", "MINISTACK_HOST": "localhost",
        "AWS_ENDPOINT_URL": url, "REDIS_HOST": "127.0.0.1", "IOT_MTLS_ENABLED": "0", "SFTP_ENABLED": "0",
        # Roles' policies, signatures and their expiry count.
        "AUTH": "true",
    }
    with open(log_path, "wb") as log:
        command = [sys.executable, HERE / "start_emulator.py"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/_ministack/health", timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                fail(f"the emulator did not start\n{log_path.read_text()}")
            time.sleep(0.1)
        yield url
    finally:
        # It ends itself, and with it its functions.
        process.stdin.close()
        process.wait()


def quietly(command, what, timeout=None, **options):
    """Runs a command whose output matters only where it fails."""
    with child(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options) as process:
        output, _ = process.communicate(timeout=timeout)
    if process.returncode != 0:
        fail(f"{what} failed\n{output}")
    return output


def models(llm_url):
    """The proxy's: the stand-in of the LLM, and one that it stands in for, whose server is never there."""
    prices = {"prompt_usd_per_million": 1, "completion_usd_per_million": 4}
    return {
        "stand-in": {"base_url": llm_url, "api_key_name": "LLM_API_KEY", **prices},
        "gone": {"base_url": "http://127.0.0.1:9/v1", "fallback": "spare"},
        "spare": {"base_url": llm_url, "model": "a-spare", "api_key_name": "SPARE_KEY"},
    }


def apply_stage(scratch, url, llm_address, webhook_address, page_port):
    """The applied stage's outputs."""
    # A copy: the stage's state and the provider's lock stay out of the tree.
    folder = scratch / "terraform"
    shutil.copytree(ROOT / "terraform", folder, ignore=shutil.ignore_patterns(".terraform*", "backend.tf"))
    packages = pathlib.Path(os.environ.get("PACKAGES_DIR", ROOT / "target" / "lambda")).resolve()
    if not any(packages.glob("*.zip")):
        fail(f"no packages in {packages}; run scripts/package first")
    manifest = (ROOT / "model" / "manifest.json").read_bytes()
    terraform = ["terraform", f"-chdir={folder}"]
    hint = "terraform init (the AWS provider is downloaded, or found where TF_CLI_CONFIG_FILE says)"
    quietly([*terraform, "init", "-input=false", "-no-color"], hint)
    llm_url = f"http://{llm_address}/v1"
    variables = {"llm_base_url": llm_url, "llm_model": "stand-in", "llm_models": json.dumps(models(llm_url))}
    variables |= {"webhook_hosts": json.dumps([webhook_address])}
    variables |= {"allowed_origins": json.dumps([f"http://127.0.0.1:{page_port}"])}
    variables |= {"emulator_url": url, "packages_dir": packages, "model_digest": hashlib.sha256(manifest).hexdigest()}
    command = [*terraform, "apply", "-input=false", "-auto-approve", "-no-color", "-var-file=stages/local.tfvars"]
    # Those of the environment come before a file's and would lose against it.
    chosen = {name.removeprefix("TF_VAR_"): value for name, value in os.environ.items() if name.startswith("TF_VAR_")}
    command += [f"-var={name}={value}" for name, value in (variables | chosen).items()]
    quietly(command, "terraform apply", timeout=STALLED_SECONDS)
    outputs = json.loads(quietly([*terraform, "output", "-json"], "terraform output"))
    return {name: output["value"] for name, output in outputs.items()}


def main():
    with tempfile.TemporaryDirectory(prefix="lesion-emulator-", ignore_cleanup_errors=True) as folder:
        scratch = pathlib.Path(folder)
        log = pathlib.Path(os.environ.get("EMULATOR_LOG", scratch / "log"))
        with emulator(scratch, log) as url:
            for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
                os.environ.pop(name, None)
            os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1",
                           "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
            llm_address, webhook_address = (f"127.0.0.1:{free_port()}" for _ in range(2))
            page_port = free_port()
            outputs = apply_stage(scratch, url, llm_address, webhook_address, page_port)
            load = [sys.executable, HERE / "load_stage.py", outputs["bucket_name"], outputs["secret_arn"]]
            keys = {"LLM_API_KEY": "a-key-of-the-emulator", "SPARE_KEY": "a-spare-key-of-the-emulator"}
            quietly([*load, *outputs["llm_key_names"].split()], "loading the stage", env=os.environ | keys)
            key = quietly([sys.executable, HERE / "first_key.py", outputs["callers_table_name"]], "making a key")
            os.environ["LESION_API_KEY"] = key.strip()
            os.environ |= {variable: outputs[output] for variable, output in NAMES.items()}
            os.environ |= {"LLM_ADDRESS": llm_address, "WEBHOOK_ADDRESS": webhook_address, "PAGE_PORT": str(page_port)}
            os.environ["EMULATOR_LOG"] = str(log)
            with child(sys.argv[1:]) as command:
                return command.wait()


def stop(number, _):
    # Unwinds through every block above; a second signal must not cut that short.
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, signal.SIG_IGN)
    raise SystemExit(128 + number)


for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(sign, stop)
try:
    code = main()
except subprocess.TimeoutExpired:
    print("scripts/emulator: the emulator stalled; once more", file=sys.stderr)
    code = main()
sys.exit(code if code >= 0 else 128 - code)
