output "name" {
  description = "The function's name."
  value       = aws_lambda_function.this.function_name
}

output "arn" {
  description = "The function's ARN."
  value       = aws_lambda_function.this.arn
}

output "invoke_arn" {
  description = "What an HTTP API calls."
  value       = aws_lambda_function.this.invoke_arn
}

output "policy" {
  description = "The role's policy, as JSON."
  value       = aws_iam_role_policy.this.policy
}

output "subnet_ids" {
  description = "Where the function joins a network."
  value       = var.network == null ? [] : var.network.subnet_ids
}

output "package" {
  description = "The zip that it was made of."
  value       = aws_lambda_function.this.filename
}
