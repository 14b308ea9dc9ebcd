"""Lambda's Runtime API, as much of it as a function needs, with a stopwatch."""

import http.server
import json
import os
import pathlib
import queue
import statistics
import subprocess
import tempfile
import threading
import time

MS = 1e3
# A function that is silent for longer has died or hangs.
PATIENCE = 60


class RuntimeApi:
    """Serves one process: hands it events one after another and takes the answers."""

    def __enter__(self):
        api = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # An answer goes out in one piece, and at once.
            disable_nagle_algorithm = True
            wbufsize = 65536

            def do_GET(self):
                api.asked.put(time.monotonic())
                number, event = api.events.get()
                body = json.dumps(event).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.send_header("lambda-runtime-aws-request-id", f"00000000-0000-4000-8000-{number:012}")
                self.send_header("lambda-runtime-deadline-ms", str(int((time.time() + PATIENCE) * MS)))
                self.send_header("lambda-runtime-invoked-function-arn", "arn:aws:lambda:us-east-1:000000000000:function:bench")
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self):
                moment = time.monotonic()
                body = self.rfile.read(int(self.headers["content-length"] or 0))
                self.send_response(202)
                self.send_header("content-length", "0")
                self.end_headers()
                self.wfile.flush()
                api.answers.put((moment, self.path.endswith("/response"), body))

            def log_message(self, *_):
                pass

        self.events, self.asked, self.answers = queue.Queue(), queue.Queue(), queue.Queue()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def measure(self, command, environment, events):
        """Starts the process and has it work the events. What it took, and its answers."""
        host, port = self.server.server_address
        environment = environment | {
            "AWS_LAMBDA_RUNTIME_API": f"{host}:{port}", "AWS_LAMBDA_FUNCTION_NAME": "bench",
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "1769", "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
            "AWS_LAMBDA_LOG_GROUP_NAME": "bench", "AWS_LAMBDA_LOG_STREAM_NAME": "bench",
        }
        started = time.monotonic()
        log = tempfile.TemporaryFile()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            ready = self.asked.get(timeout=PATIENCE)
            answers, warm, cpu = [], [], []
            for number, event in enumerate(events):
                cpu_before, given = cpu_ms(process.pid), time.monotonic()
                self.events.put((number, event))
                moment, fine, body = self.answers.get(timeout=PATIENCE)
                if not fine:
                    raise RuntimeError(f"{command[0]} failed: {body[:300]!r}")
                answers.append(json.loads(body or b"null"))
                if number == 0:
                    first = moment
                else:
                    warm.append((moment - given) * MS)
                    cpu.append(cpu_ms(process.pid) - cpu_before)
                # It asks again when it is done.
                self.asked.get(timeout=PATIENCE)
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        except (queue.Empty, RuntimeError) as error:
            log.seek(0)
            raise SystemExit(f"{command[0]}: {error!r}\n{log.read().decode()[-3000:]}") from error
        finally:
            process.kill()
            process.wait()
            log.close()
        measured = {
            "ready_ms": (ready - started) * MS, "answer_ms": (first - started) * MS,
            "warm_ms": statistics.median(warm), "cpu_ms": statistics.mean(cpu), "peak_mb": peak_mb(status),
        }
        return measured, answers


def cpu_ms(pid):
    """Of all its threads: user and system time in ticks, behind the name (proc(5))."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") * MS


def peak_mb(status):
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6
