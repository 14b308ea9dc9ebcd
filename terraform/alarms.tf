# Each alarm has its own section, of the same name, in docs/RUNBOOK.md; tests/rules.tftest.hcl checks.
locals {
  of_queue = { namespace = "AWS/SQS", statistic = "Maximum" }
  of_code  = { namespace = local.names.metric_namespace, dimensions = { (local.names.metric_dimension) = var.stage } }
  lambdas  = { for key, function in module.function : key => { FunctionName = function.name } }

  alarms = merge(
    {
      dead-letters = merge(local.of_queue, {
        metric     = "ApproximateNumberOfMessagesVisible"
        dimensions = { QueueName = aws_sqs_queue.dead_letters.name }
        above      = 0
      })
      # Ends of jobs that no receiver took in a day.
      webhook-dead-letters = merge(local.of_queue, {
        metric     = "ApproximateNumberOfMessagesVisible"
        dimensions = { QueueName = aws_sqs_queue.webhook_dead_letters.name }
        above      = 0
      })
      enrichment-failures = merge(local.of_queue, {
        metric     = "ApproximateNumberOfMessagesVisible"
        dimensions = { QueueName = aws_sqs_queue.enrichment_failures.name }
        above      = 0
      })
      # Seconds that the oldest photo waits.
      queue-age = merge(local.of_queue, {
        metric     = "ApproximateAgeOfOldestMessage"
        dimensions = { QueueName = aws_sqs_queue.jobs.name }
        above      = 15 * 60
      })
      # The same of the oldest prompt, while it is answered and hidden behind a death included.
      prompt-age = merge(local.of_queue, {
        metric     = "ApproximateAgeOfOldestMessage"
        dimensions = { QueueName = aws_sqs_queue.prompts.name }
        above      = 4 * local.enrichment_timeout_seconds
      })
      # Milliseconds that the oldest change waits, longer than behind one description.
      iterator-age = {
        namespace  = "AWS/Lambda", metric = "IteratorAge", statistic = "Maximum"
        dimensions = local.lambdas["enrichment"], above = (5 * 60 + min(local.lease_seconds, local.enrichment_timeout_seconds)) * 1000
      }
      # The same before those are told who have subscribed.
      notify-age = {
        namespace  = "AWS/Lambda", metric = "IteratorAge", statistic = "Maximum"
        dimensions = local.lambdas["notify"], above = 60 * 1000
      }
      # Connections and messages that the function answered with an error.
      socket-errors = {
        namespace  = "AWS/ApiGateway", metric = "IntegrationError", statistic = "Sum"
        dimensions = { ApiId = aws_apigatewayv2_api.socket.id }, above = 5
      }
      # Those for which it could not be called.
      socket-unreachable = {
        namespace  = "AWS/ApiGateway", metric = "ExecutionError", statistic = "Sum"
        dimensions = { ApiId = aws_apigatewayv2_api.socket.id }, above = 5
      }
      api-errors = {
        namespace  = "AWS/ApiGateway", metric = "5xx", statistic = "Sum"
        dimensions = { ApiId = aws_apigatewayv2_api.http.id }, above = 5
      }
      # Jobs that sweep found past their deadline or out of attempts. It counts none as well: silence is a sweep
      # that does not run.
      stuck-jobs = merge(local.of_code, {
        metric = local.names.metrics.stuck_jobs, statistic = "Maximum", above = 0, missing = "breaching"
      })
      llm-failures = merge(local.of_code, { metric = local.names.metrics.llm_failures, statistic = "Sum", above = 5 })
    },
    {
      for key, dimensions in local.lambdas : "function-errors-${key}" => {
        namespace = "AWS/Lambda", metric = "Errors", statistic = "Sum", dimensions = dimensions, above = 2
      }
    },
    {
      for key, dimensions in local.lambdas : "throttles-${key}" => {
        namespace = "AWS/Lambda", metric = "Throttles", statistic = "Sum", dimensions = dimensions, above = 0
      }
    },
  )

  # The section of the runbook: an alarm's name, without the function's.
  runbook = {
    for name in keys(local.alarms) : name => replace(name, "/-(${join("|", keys(local.functions))})$/", "")
  }
}

# Carries names of alarms only; CloudWatch could not publish under a key of AWS's own.
resource "aws_sns_topic" "alarms" {
  name = "${local.name}-alarms"
}

resource "aws_sns_topic_subscription" "alarms" {
  count     = var.alarm_email == null ? 0 : 1
  topic_arn = aws_sns_topic.alarms.arn
  protocol  = "email"
  endpoint  = var.alarm_email
}

resource "aws_cloudwatch_metric_alarm" "this" {
  for_each = local.alarms

  alarm_name          = "${local.name}-${each.key}"
  alarm_description   = "docs/RUNBOOK.md#${local.runbook[each.key]}"
  namespace           = each.value.namespace
  metric_name         = each.value.metric
  dimensions          = each.value.dimensions
  statistic           = each.value.statistic
  comparison_operator = "GreaterThanThreshold"
  threshold           = each.value.above
  period              = 300
  evaluation_periods  = 1
  treat_missing_data  = try(each.value.missing, "notBreaching")
  alarm_actions       = [aws_sns_topic.alarms.arn]
  ok_actions          = [aws_sns_topic.alarms.arn]
}

# Counts what carries the tag `stage`, once that tag is activated for cost allocation.
resource "aws_budgets_budget" "month" {
  count        = var.monthly_budget_usd == null ? 0 : 1
  name         = local.name
  budget_type  = "COST"
  limit_amount = var.monthly_budget_usd
  limit_unit   = "USD"
  time_unit    = "MONTHLY"

  cost_filter {
    name   = "TagKeyValue"
    values = [format("user:stage$%s", var.stage)]
  }

  dynamic "notification" {
    for_each = { ACTUAL = 80, FORECASTED = 100 }

    content {
      notification_type          = notification.key
      threshold                  = notification.value
      threshold_type             = "PERCENTAGE"
      comparison_operator        = "GREATER_THAN"
      subscriber_email_addresses = [var.alarm_email]
    }
  }
}
