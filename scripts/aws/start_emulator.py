"""Starts the emulator for beside_emulator.py, and ends it when standard input does.

Three stalls are taken out of MiniStack 1.5.33 on the way: none of them is there on AWS.
"""

import http.server
import os
import signal
import sys
import threading
import time

# One group with every function that it will start.
os.setpgid(0, 0)


def end_with_parent():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


threading.Thread(target=end_with_parent, daemon=True).start()

# The Runtime API sends each header in a packet of its own and waits for the acknowledgement.
http.server.BaseHTTPRequestHandler.disable_nagle_algorithm = True
http.server.BaseHTTPRequestHandler.wbufsize = 65536

from ministack import app  # noqa: E402
from ministack.core import lambda_runtime  # noqa: E402
from ministack.services import lambda_svc  # noqa: E402

# An invocation that logs nothing is held for 50 ms in case a line comes.
for name in dir(lambda_runtime):
    drain = getattr(getattr(lambda_runtime, name), "_drain_stderr_bounded", None)
    if drain is not None:
        drain.__defaults__ = (0.005, 0.005, 0.250)

# Queues wait while a function works on a batch of the stream: the stream gets a thread of its own.
poll_streams = lambda_svc._poll_dynamodb_streams
lambda_svc._poll_dynamodb_streams = lambda: False


def follow_streams():
    while True:
        try:
            busy = poll_streams()
        except Exception as error:  # noqa: BLE001
            print(f"streams: {error!r}", file=sys.stderr)
            busy = False
        if not busy:
            time.sleep(0.1)


threading.Thread(target=follow_streams, daemon=True).start()
app.main()
