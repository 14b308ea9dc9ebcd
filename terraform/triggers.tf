# What calls the functions that have no address.
resource "aws_lambda_event_source_mapping" "inference" {
  event_source_arn        = aws_sqs_queue.jobs.arn
  function_name           = module.function["inference"].arn
  batch_size              = 1
  function_response_types = ["ReportBatchItemFailures"]

  scaling_config {
    maximum_concurrency = var.max_concurrent_inferences
  }
}

# The filter lets through only writes that leave the marker, so enrichment's own writes never match.
resource "aws_lambda_event_source_mapping" "enrichment" {
  event_source_arn  = aws_dynamodb_table.jobs.stream_arn
  function_name     = module.function["enrichment"].arn
  starting_position = "TRIM_HORIZON"

  # A shard's descriptions at a time are at most the product of these two. A batch lasts as long as its
  # slowest one, and holds up what comes behind it in one of ten lanes; prompts are only sent on (prompts.tf).
  batch_size             = 10
  parallelization_factor = 10

  # What is given up here is still due in its record, and sweep marks it again.
  maximum_retry_attempts             = 3
  maximum_record_age_in_seconds      = 3600
  bisect_batch_on_function_error     = true
  function_response_types            = ["ReportBatchItemFailures"]
  maximum_batching_window_in_seconds = 0

  destination_config {
    on_failure {
      destination_arn = aws_sqs_queue.enrichment_failures.arn
    }
  }

  filter_criteria {
    filter {
      pattern = jsonencode({
        dynamodb = {
          NewImage = {
            (local.names.dispatch_attribute) = { S = [local.names.dispatch_enrichment] }
          }
        }
      })
    }
  }
}

# Every write to a record, and not to the other items of the table. What is given up here is told to
# nobody: a client that misses it asks, and subscribes again.
resource "aws_lambda_event_source_mapping" "notify" {
  event_source_arn  = aws_dynamodb_table.jobs.stream_arn
  function_name     = module.function["notify"].arn
  starting_position = "LATEST"

  # Several writes to one record in a batch are told once.
  batch_size                         = 100
  parallelization_factor             = 10
  maximum_retry_attempts             = 8
  maximum_record_age_in_seconds      = 300
  bisect_batch_on_function_error     = true
  function_response_types            = ["ReportBatchItemFailures"]
  maximum_batching_window_in_seconds = 0

  filter_criteria {
    filter {
      pattern = jsonencode({ dynamodb = { NewImage = { claim = { N = [{ exists = true }] } } } })
    }
  }
}

resource "aws_cloudwatch_event_rule" "sweep" {
  name                = "${local.name}-sweep"
  description         = "Looks for jobs that are due."
  schedule_expression = "rate(1 minute)"
}

resource "aws_cloudwatch_event_target" "sweep" {
  rule = aws_cloudwatch_event_rule.sweep.name
  arn  = module.function["sweep"].arn
}

resource "aws_lambda_permission" "sweep" {
  statement_id  = "schedule"
  action        = "lambda:InvokeFunction"
  function_name = module.function["sweep"].name
  principal     = "events.amazonaws.com"
  source_arn    = aws_cloudwatch_event_rule.sweep.arn
}

# A sweep that failed is made good by the next one.
resource "aws_lambda_function_event_invoke_config" "sweep" {
  function_name                = module.function["sweep"].name
  maximum_retry_attempts       = 0
  maximum_event_age_in_seconds = 60
}
