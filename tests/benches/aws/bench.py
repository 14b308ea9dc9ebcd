"""scripts/bench aws, beside the emulator: photos through the stage, and each function as a process of its
own beside a Python handler of the inference job.

    python bench.py [--quick] [--save FILE]

The interpreter has the handler's packages, and works the handler as well. Everything is the median of its rounds, in
which Rust and Python take turns: the machine may be shared.
"""

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import datetime
import http.server
import json
import os
import pathlib
import statistics
import sys
import tempfile
import threading
import time
import zipfile

import botocore.session
import urllib3
from runtime_api import RuntimeApi

ROOT = pathlib.Path(__file__).resolve().parents[3]
HERE = pathlib.Path(__file__).resolve().parent
REAL = ROOT.parent / "shared" / "data" / "ham10000" / "images"
FUNCTIONS = ("submit", "inference", "enrichment", "result", "sweep", "admin")
# What an app sends at once.
LANES = 8
MS = 1e3

http_pool = urllib3.PoolManager(maxsize=LANES)
session = botocore.session.get_session()
lambdas, dynamodb = session.create_client("lambda"), session.create_client("dynamodb")


def photos(count):
    """Small photos, as cameras of a clinic make them; drawn ones where there are no real ones."""
    real = sorted(REAL.glob("*.jpg"))
    found = real[:: max(1, len(real) // count)][:count] or [ROOT / "model" / "samples" / "mole-drawn.png"]
    return [path.read_bytes() for path in found], "HAM10000, 200x150" if real else "model/samples, drawn"


def content_type(photo):
    return "image/jpeg" if photo.startswith(b"\xff\xd8") else "image/png"


def call(method, path, body=None, headers=None):
    headers = {"authorization": f"Bearer {os.environ['LESION_API_KEY']}"} | (headers or {})
    answer = http_pool.request(method, os.environ["API_URL"] + path, body=body, headers=headers, retries=False)
    if answer.status >= 300:
        raise SystemExit(f"{method} {path}: {answer.status} {answer.data[:200]!r}")
    return answer.json()


@contextlib.contextmanager
def llm():
    """Answers at once, what a good LLM would: its own time is not ours."""
    text = "A melanocytic naevus is a growth made of pigment cells. It is often round or oval with an even colour."
    message = {"role": "assistant", "content": json.dumps({"explanation": text})}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    completion = {"model": "stand-in", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            body = json.dumps(completion).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    host, port = os.environ["LLM_ADDRESS"].split(":")
    server = http.server.ThreadingHTTPServer((host, int(port)), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield
    server.shutdown()


def through_the_stage(count):
    """Submits that many photos at once and waits for all of them."""
    bodies, _ = photos(count)
    latencies = []

    def submit(number):
        photo = bodies[number % len(bodies)]
        started = time.monotonic()
        request_id = call("POST", "/submit", photo, {"content-type": content_type(photo)})["request_id"]
        latencies.append((time.monotonic() - started) * MS)
        return request_id

    def ended(request_id):
        while True:
            result = call("GET", f"/result/{request_id}?wait=20")
            if result["status"] not in ("pending", "processing", "awaiting_description"):
                return result

    with concurrent.futures.ThreadPoolExecutor(LANES) as lanes:
        ids = list(lanes.map(submit, range(count)))
        results = list(lanes.map(ended, ids))
    records = [record(request_id) for request_id in ids]
    moment = datetime.datetime.fromisoformat
    first = min(moment(record["created_at"]) for record in records)
    last = max(moment(record["updated_at"]) for record in records)
    stages = collections.defaultdict(list)
    for result in results:
        for stage, millis in result["timings_ms"].items():
            stages[stage].append(millis)
    figures = {f"{stage}, ms": statistics.median(millis) for stage, millis in stages.items()}
    return {"jobs per second": count / (last - first).total_seconds(), "submit, ms": statistics.median(latencies)} | figures


def item(request_id):
    key = {"id": {"S": request_id}}
    return dynamodb.get_item(TableName=os.environ["TABLE_NAME"], Key=key, ConsistentRead=True)["Item"]


def record(request_id):
    return json.loads(item(request_id)["record"]["S"])


def stop_triggers():
    """From here on messages and changes wait for whoever is measured."""
    for mapping in lambdas.list_event_source_mappings()["EventSourceMappings"]:
        lambdas.update_event_source_mapping(UUID=mapping["UUID"], Enabled=False)
    session.create_client("events").disable_rule(Name="lesion-local-sweep")
    time.sleep(5)


def http_event(method, path, body=b"", headers=None):
    headers = {"authorization": f"Bearer {os.environ['LESION_API_KEY']}", "host": "bench.example"} | (headers or {})
    about = {"method": method, "path": path, "protocol": "HTTP/1.1", "sourceIp": "127.0.0.1", "userAgent": "bench"}
    context = {
        "accountId": "000000000000", "apiId": "bench", "domainName": "bench.example", "domainPrefix": "bench",
        "http": about, "requestId": "bench", "routeKey": "$default", "stage": "$default",
        "time": "01/Jan/2026:00:00:00 +0000", "timeEpoch": 1767225600000,
    }
    return {
        "version": "2.0", "routeKey": "$default", "rawPath": path, "rawQueryString": "", "headers": headers,
        "requestContext": context, "body": base64.b64encode(body).decode(), "isBase64Encoded": True,
    }


def sqs_event(request_id):
    message = {
        "messageId": request_id, "receiptHandle": "bench", "attributes": {"ApproximateReceiveCount": "1"},
        "body": json.dumps({"version": 1, "type": "infer", "id": request_id}), "messageAttributes": {},
        "md5OfBody": "", "eventSource": "aws:sqs", "eventSourceARN": "arn:aws:sqs:us-east-1:000000000000:bench",
        "awsRegion": "us-east-1",
    }
    return {"Records": [message]}


def stream_event(request_id):
    change = {
        "ApproximateCreationDateTime": int(time.time()), "Keys": {"id": {"S": request_id}}, "NewImage": {},
        "OldImage": {}, "SequenceNumber": "1", "SizeBytes": 1, "StreamViewType": "NEW_IMAGE",
    }
    about = {
        "eventID": request_id, "eventName": "MODIFY", "eventVersion": "1.1", "eventSource": "aws:dynamodb",
        "awsRegion": "us-east-1", "dynamodb": change,
        "eventSourceARN": "arn:aws:dynamodb:us-east-1:000000000000:table/bench/stream/now",
    }
    return {"Records": [about]}


SCHEDULE_EVENT = {
    "version": "0", "id": "bench", "detail-type": "Scheduled Event", "source": "aws.events", "region": "us-east-1",
    "account": "000000000000", "time": "2026-01-01T00:00:00Z", "resources": [], "detail": {},
}


class Bench:
    def __init__(self, scratch, rounds, warm):
        self.scratch, self.rounds, self.warm = scratch, rounds, warm
        self.bodies, self.source = photos(100)
        self.environment = {}
        packages = pathlib.Path(os.environ.get("PACKAGES_DIR", ROOT / "target" / "lambda"))
        for name in FUNCTIONS:
            with zipfile.ZipFile(packages / f"{name}.zip") as package:
                package.extractall(scratch / name)
            (scratch / name / "bootstrap").chmod(0o755)
            found = lambdas.get_function_configuration(FunctionName=f"lesion-local-{name}")
            self.environment[name] = found["Environment"]["Variables"]
        # Inference reads for the stage's LLM, and enrichment describes by template: what an LLM takes is not ours to
        # measure.
        for variable in [name for name in self.environment["enrichment"] if name.startswith("LLM_")]:
            del self.environment["enrichment"][variable]

    def run(self, name, events, command=None):
        """One process from its start over all events; its folder for temporary files is empty at first."""
        function = "inference" if name == "python" else name
        with tempfile.TemporaryDirectory(dir=self.scratch) as temporary:
            aws = {variable: value for variable, value in os.environ.items() if variable.startswith("AWS_")}
            environment = self.environment[function] | aws
            environment |= {"PATH": os.environ["PATH"], "TMPDIR": temporary, "LAMBDA_TASK_ROOT": str(self.scratch / name)}
            with RuntimeApi() as api:
                return api.measure(command or [self.scratch / name / "bootstrap"], environment, events)

    def submitted(self, count):
        photo = lambda number: self.bodies[number % len(self.bodies)]  # noqa: E731
        events = [http_event("POST", "/submit", photo(n), {"content-type": content_type(photo(n))}) for n in range(count)]
        measured, answers = self.run("submit", events)
        return measured, [json.loads(answer["body"])["request_id"] for answer in answers]

    def round(self):
        """Each function once, cold and then warm."""
        count = self.warm + 1
        measured = {}
        measured["submit"], ids = self.submitted(2 * count)
        mine, pythons = ids[:count], ids[count:]
        measured["inference"], _ = self.run("inference", [sqs_event(name) for name in mine])
        command = [sys.executable, HERE / "handler.py"]
        measured["python"], _ = self.run("python", [sqs_event(name) for name in pythons], command)
        statuses = {item(name)["status"]["S"] for name in ids}
        # Photos that the gate or the model turns away take the same way, but not the whole of it.
        if not statuses <= {"awaiting_description", "completed", "needs_retake"}:
            raise SystemExit(f"inference left jobs {statuses}")
        # Sweep would not know what to make of them.
        for name in pythons:
            dynamodb.delete_item(TableName=os.environ["TABLE_NAME"], Key={"id": {"S": name}})
        measured["enrichment"], _ = self.run("enrichment", [stream_event(name) for name in mine])
        events = [http_event("GET", f"/result/{name}") for name in mine]
        measured["result"], answers = self.run("result", events)
        if any(answer["statusCode"] != 200 for answer in answers):
            raise SystemExit("result did not answer")
        measured["sweep"], _ = self.run("sweep", [SCHEDULE_EVENT] * 3)
        measured["admin"], _ = self.run("admin", [http_event("GET", "/admin/keys")] * count)
        self.record_bytes = len(json.dumps(item(mine[0])))
        return measured

    def rounds_of_all(self):
        found = [self.round() for _ in range(self.rounds)]
        names = [*FUNCTIONS, "python"]
        return {
            name: {figure: statistics.median(one[name][figure] for one in found) for figure in found[0][name]}
            for name in names
        }


def print_stage(rounds, count, source):
    print(f"\nthe stage   {count} jobs from {LANES} clients, {len(rounds)} rounds; photos: {source}; LLM: answers at once")
    middle = {figure: statistics.median(one[figure] for one in rounds) for figure in rounds[0]}
    for figure, value in middle.items():
        print(f"  {figure:<22}{value:>9.1f}   ({min(one[figure] for one in rounds):.1f} to {max(one[figure] for one in rounds):.1f})")
    return middle


def print_functions(measured, rounds, warm):
    print(f"\neach as a process   medians of {rounds} starts, each with {warm} warm calls; nothing of Lambda's own around it")
    head = ("ready, ms", "answer, ms", "warm, ms", "CPU, ms", "peak, MB")
    print(f"{'':<22}" + "".join(f"{name:>12}" for name in head))
    names = {name: name for name in FUNCTIONS} | {"python": "inference in Python"}
    for name, title in names.items():
        figures = measured[name]
        cells = [figures[key] for key in ("ready_ms", "answer_ms", "warm_ms", "cpu_ms", "peak_mb")]
        print(f"{title:<22}" + "".join(f"{cell:>12.1f}" for cell in cells))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--save", type=pathlib.Path)
    chosen = parser.parse_args()
    count, stage_rounds, rounds, warm = (60, 2, 3, 5) if chosen.quick else (200, 3, 7, 15)
    with llm(), tempfile.TemporaryDirectory(prefix="lesion-bench-") as scratch:
        print(f"machine     {os.cpu_count()} cores")
        stage = print_stage([through_the_stage(count) for _ in range(stage_rounds)], count, photos(1)[1])
        stop_triggers()
        bench = Bench(pathlib.Path(scratch), rounds, warm)
        measured = bench.rounds_of_all()
        print_functions(measured, rounds, warm)
    if chosen.save:
        saved = {"stage": stage, "functions": measured, "record_bytes": bench.record_bytes}
        rounded = json.loads(json.dumps(saved), parse_float=lambda text: round(float(text), 1))
        chosen.save.write_text(json.dumps(rounded, indent=2) + "\n")


main()
