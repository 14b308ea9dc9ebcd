# What holds for the file of each stage; scripts/check-terraform runs this once with each.

mock_provider "aws" {
  source          = "./tests/mocks"
  override_during = plan
}

variables {
  model_digest = "0000000000000000000000000000000000000000000000000000000000000000"
  packages_dir = "tests/packages"
}

run "the_stages_file_plans_and_its_name_is_in_every_name" {
  command = plan

  assert {
    condition = alltrue([
      for name in concat(
        [for it in module.function : it.name],
        [for it in aws_cloudwatch_metric_alarm.this : it.alarm_name],
        [
          aws_dynamodb_table.jobs.name, aws_dynamodb_table.callers.name, aws_dynamodb_table.connections.name,
          aws_apigatewayv2_api.socket.name, aws_sqs_queue.jobs.name,
          aws_sqs_queue.dead_letters.name, aws_sqs_queue.enrichment_failures.name,
          aws_sqs_queue.webhooks.name, aws_sqs_queue.webhook_dead_letters.name, aws_sqs_queue.prompts.name,
          aws_s3_bucket.blobs.bucket_prefix, aws_secretsmanager_secret.functions.name,
          aws_apigatewayv2_api.http.name, aws_cloudwatch_event_rule.sweep.name, aws_sns_topic.alarms.name,
        ],
      ) : startswith(name, "lesion-${var.stage}-") || name == "lesion-${var.stage}"
    ])
    error_message = "Two stages in one account would meet."
  }

  assert {
    condition     = var.stage != "prod" || (var.keep_data && !var.admit_guests)
    error_message = "prod keeps its data and admits no guests."
  }

  assert {
    condition     = var.stage != "prod" || lookup(var.reserved_concurrency, "chat", 0) > 0
    error_message = "Nothing bounds what anybody can have run at chat's public address."
  }

  assert {
    condition     = var.stage != "prod" || alltrue([for name in ["inference", "result", "sweep"] : lookup(var.reserved_concurrency, name, 0) > 0])
    error_message = "Those who wait for results could take the instances that photos and sweep need."
  }
}
