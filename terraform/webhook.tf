# The queue before webhook, and where its messages end. Notify fills it.
locals {
  # Longer than one request may take, with its writes.
  webhook_timeout_seconds = 30

  webhook_hosts_environment = { WEBHOOK_HOSTS = join(",", var.webhook_hosts) }
  webhook_queue_environment = { WEBHOOK_QUEUE_URL = aws_sqs_queue.webhooks.url }
  webhook_letters_environment = {
    WEBHOOK_QUEUE_URL             = aws_sqs_queue.webhooks.url
    WEBHOOK_DEAD_LETTER_QUEUE_URL = aws_sqs_queue.webhook_dead_letters.url
  }
  may_bury_webhooks = { actions = ["sqs:SendMessage"], resources = [aws_sqs_queue.webhook_dead_letters.arn] }
  may_send_webhooks = { actions = ["sqs:SendMessage"], resources = [aws_sqs_queue.webhooks.arn] }
}

resource "aws_sqs_queue" "webhooks" {
  name = "${local.name}-webhooks"

  visibility_timeout_seconds = 6 * local.webhook_timeout_seconds
  message_retention_seconds  = 4 * 24 * 3600
  kms_master_key_id          = aws_kms_key.data.arn

  redrive_policy = jsonencode({
    deadLetterTargetArn = aws_sqs_queue.webhook_dead_letters.arn
    maxReceiveCount     = local.names.webhook_receives
  })
}

resource "aws_sqs_queue" "webhook_dead_letters" {
  name                      = "${local.name}-webhook-dead-letters"
  message_retention_seconds = 14 * 24 * 3600
  kms_master_key_id         = aws_kms_key.data.arn
}

resource "aws_lambda_event_source_mapping" "webhook" {
  event_source_arn        = aws_sqs_queue.webhooks.arn
  function_name           = module.function["webhook"].arn
  function_response_types = ["ReportBatchItemFailures"]

  # Worked at once: the slowest receiver of a batch holds up nine others for ten seconds at most.
  batch_size = 10

  scaling_config {
    maximum_concurrency = 10
  }
}
