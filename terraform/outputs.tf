output "table_name" {
  description = "DynamoDB table of the records."
  value       = aws_dynamodb_table.jobs.name
}

output "queue_url" {
  description = "SQS queue in front of inference."
  value       = aws_sqs_queue.jobs.url
}

output "dead_letter_queue_url" {
  description = "Where messages end that were received too often."
  value       = aws_sqs_queue.dead_letters.url
}

output "prompt_queue_url" {
  description = "SQS queue of prompts in front of enrichment."
  value       = aws_sqs_queue.prompts.url
}

output "webhook_queue_url" {
  description = "SQS queue in front of webhook."
  value       = aws_sqs_queue.webhooks.url
}

output "webhook_dead_letter_queue_url" {
  description = "Where webhooks end that no receiver took."
  value       = aws_sqs_queue.webhook_dead_letters.url
}

output "bucket_name" {
  description = "S3 bucket of photos and models."
  value       = aws_s3_bucket.blobs.bucket
}

output "callers_table_name" {
  description = "DynamoDB table of API keys and request counts."
  value       = aws_dynamodb_table.callers.name
}

output "api_url" {
  description = "Where the API is reached."
  value       = var.emulator_url == null ? aws_apigatewayv2_api.http.api_endpoint : "${var.emulator_url}/_aws/execute-api/${aws_apigatewayv2_api.http.id}/$default"
}

output "chat_url" {
  description = "Where chat is reached: no API in front of it, which would not wait."
  value       = var.emulator_url == null ? trimsuffix(aws_lambda_function_url.chat.function_url, "/") : "${var.emulator_url}/_aws/lambda-url/${aws_lambda_function_url.chat.url_id}"
}

output "connections_table_name" {
  description = "DynamoDB table of open WebSockets."
  value       = aws_dynamodb_table.connections.name
}

output "socket_url" {
  description = "Where WebSockets are opened, with a ticket."
  value       = local.socket_url
}

output "secret_arn" {
  description = "Secret with LLM_API_KEY, the keys of llm_models, CACHE_KEY and WEBHOOK_SECRET."
  value       = aws_secretsmanager_secret.functions.arn
}

output "llm_key_names" {
  description = "Which keys the secret must have for llm_models, with spaces between."
  value       = join(" ", sort(distinct([for it in var.llm_models : it.api_key_name if try(it.api_key_name, null) != null])))
}

output "function_names" {
  description = "The functions, by what they do."
  value       = { for key, function in module.function : key => function.name }
}

output "region" {
  description = "AWS region of the stage."
  value       = var.region
}

output "page_url" {
  description = "Where people find the page; null where the stage has none."
  value       = var.page ? "https://${aws_cloudfront_distribution.page[0].domain_name}" : null
}
