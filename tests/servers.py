"""Processes beside the tests in Python, each stopped by its id: run by tests/openai and tests/schemathesis."""

import contextlib
import os
import pathlib
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

CONFIG = pathlib.Path(__file__).parent / "openai" / "litellm.yaml"


@contextlib.contextmanager
def running(command, **options):
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def litellm(programs, log):
    """LiteLLM of that folder of programs, which makes up what it answers: its address and its key, once it listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    key, url = f"sk-{secrets.token_hex(24)}", f"http://127.0.0.1:{port}"
    command = [pathlib.Path(programs) / "litellm", "--config", CONFIG, "--host", "127.0.0.1", "--port", port]
    with running(command, env=os.environ | {"LITELLM_MASTER_KEY": key}, stdout=log, stderr=log) as server:
        for _ in range(240):
            if server.poll() is not None:
                sys.exit("LiteLLM has ended")
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{url}/health/liveliness", timeout=2).close()
                break
            time.sleep(0.5)
        else:
            sys.exit("LiteLLM does not answer")
        yield url, key
