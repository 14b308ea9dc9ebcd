"""The inference job as a Python Lambda, to compare with: fetch the photo, decode it, make the network's
input, run it, write the record under a condition.

Triggered by the queue. It does less than functions/inference: no check for missing pixels, no quality
gate, no abstention, no cache, no release after a failure, no golden vectors at start, no log. The record
gets the probabilities as attributes of their own.
"""

import io
import json
import os
import pathlib
import tempfile
import urllib.request

import boto3
import numpy
import onnxruntime
from botocore.config import Config
from PIL import Image, ImageOps

BUCKET, TABLE, DIGEST = os.environ["BUCKET"], os.environ["TABLE_NAME"], os.environ["MODEL_DIGEST"]
STYLE = {"addressing_style": "path" if os.environ.get("S3_PATH_STYLE") else "auto"}
s3 = boto3.client("s3", config=Config(s3=STYLE))
dynamodb = boto3.client("dynamodb")


def fetch_model():
    manifest = json.loads(s3.get_object(Bucket=BUCKET, Key=f"models/{DIGEST}/manifest.json")["Body"].read())
    network = s3.get_object(Bucket=BUCKET, Key=f"models/{DIGEST}/{manifest['network']['file']}")["Body"].read()
    path = pathlib.Path(tempfile.gettempdir()) / "model.onnx"
    path.write_bytes(network)
    options = onnxruntime.SessionOptions()
    # As functions/inference has it: one photo, one thread.
    options.intra_op_num_threads = 1
    return manifest, onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


MANIFEST, SESSION = fetch_model()


def tensor(photo):
    wanted = MANIFEST["input"]
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(photo))).convert("RGB")
    picture = picture.resize((wanted["width"], wanted["height"]), Image.Resampling.BILINEAR)
    pixels = numpy.asarray(picture, dtype=numpy.float32) * wanted["scale"]
    pixels = (pixels - numpy.float32(wanted["mean"])) / numpy.float32(wanted["std"])
    return pixels.transpose(2, 0, 1)[numpy.newaxis].astype(numpy.float32)


def read_photo(photo):
    logits = SESSION.run([MANIFEST["outputs"]["scores"]["name"]], {MANIFEST["input"]["name"]: tensor(photo)})[0][0]
    scores = numpy.exp((logits - logits.max()) / MANIFEST["temperature"])
    return scores / scores.sum()


def write(job, status, probabilities):
    """Where the record still stands."""
    values = {
        ":version": job["version"], ":claim": job["claim"], ":was": job["status"],
        ":next": {"N": str(int(job["version"]["N"]) + 1)}, ":status": {"S": status},
        ":found": {"S": json.dumps(probabilities)},
    }
    dynamodb.update_item(
        TableName=TABLE, Key={"id": job["id"]},
        UpdateExpression="SET version = :next, #status = :status, probabilities = :found",
        ConditionExpression="version = :version AND claim = :claim AND #status = :was",
        ExpressionAttributeNames={"#status": "status"}, ExpressionAttributeValues=values,
    )
    return job | {"version": values[":next"], "status": values[":status"]}


def handler(event):
    for record in event["Records"]:
        job_id = json.loads(record["body"])["id"]
        job = dynamodb.get_item(TableName=TABLE, Key={"id": {"S": job_id}}, ConsistentRead=True)["Item"]
        job = write(job, "processing", [])
        photo = s3.get_object(Bucket=BUCKET, Key=f"jobs/{job_id}/photo")["Body"].read()
        write(job, "awaiting_description", [round(float(share), 6) for share in read_photo(photo)])
    return {"batchItemFailures": []}


def main():
    """The Runtime API's loop, without the client that AWS ships (awslambdaric)."""
    api = f"http://{os.environ['AWS_LAMBDA_RUNTIME_API']}/2018-06-01/runtime/invocation"
    while True:
        with urllib.request.urlopen(f"{api}/next") as answer:
            request_id, event = answer.headers["lambda-runtime-aws-request-id"], json.load(answer)
        body = json.dumps(handler(event)).encode()
        urllib.request.urlopen(urllib.request.Request(f"{api}/{request_id}/response", data=body)).close()


main()
