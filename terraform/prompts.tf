# The queue of prompts before enrichment, which fills it from the stream: in a batch of the stream a prompt of minutes
# would hold up every description behind it in its lane.
locals {
  prompt_queue_environment = { PROMPT_QUEUE_URL = aws_sqs_queue.prompts.url }
}

resource "aws_sqs_queue" "prompts" {
  name = "${local.name}-prompts"

  # Not six times, as AWS advises: the message of a function that died finds its prompt answered by then, and is to be
  # gone before prompt-age takes it for one that waits.
  visibility_timeout_seconds = 2 * local.enrichment_timeout_seconds
  message_retention_seconds  = 4 * 24 * 3600
  kms_master_key_id          = aws_kms_key.data.arn

  redrive_policy = jsonencode({
    deadLetterTargetArn = aws_sqs_queue.enrichment_failures.arn
    # The record counts the attempts. What is given up here could not be worked at all, or was throttled for hours; sweep
    # sends it again.
    maxReceiveCount = 20
  })
}

resource "aws_lambda_event_source_mapping" "prompts" {
  event_source_arn        = aws_sqs_queue.prompts.arn
  function_name           = module.function["enrichment"].arn
  batch_size              = 1
  function_response_types = ["ReportBatchItemFailures"]

  scaling_config {
    maximum_concurrency = var.max_concurrent_prompts
  }
}
