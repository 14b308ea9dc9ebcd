resource "aws_sqs_queue" "jobs" {
  name = "${local.name}-jobs"

  # Six times the function's timeout, as AWS asks for with a Lambda behind it.
  visibility_timeout_seconds = 6 * var.function_timeout_seconds
  message_retention_seconds  = 4 * 24 * 3600
  kms_master_key_id          = aws_kms_key.data.arn

  redrive_policy = jsonencode({
    deadLetterTargetArn = aws_sqs_queue.dead_letters.arn
    # Above MAX_ATTEMPTS, or the queue gives a job up before the job's own attempts are used up.
    maxReceiveCount = 2 * var.max_attempts + 5
  })
}

resource "aws_sqs_queue" "dead_letters" {
  name                      = "${local.name}-dead-letters"
  message_retention_seconds = 14 * 24 * 3600
  kms_master_key_id         = aws_kms_key.data.arn
}

# What the stream gave up: which records, by their place in the stream; and messages of prompts. Nothing is put back
# from here.
resource "aws_sqs_queue" "enrichment_failures" {
  name                      = "${local.name}-enrichment-failures"
  message_retention_seconds = 14 * 24 * 3600
  kms_master_key_id         = aws_kms_key.data.arn
}
