# chat has an address of its own, which streams and waits for as long as the function may run; the HTTP API
# gives up after 30 seconds. Callers are checked in the function, as behind the API. Nothing throttles the address but
# reserved_concurrency = { chat = N }.
resource "aws_lambda_function_url" "chat" {
  function_name      = module.function["chat"].name
  authorization_type = "NONE"
  invoke_mode        = "RESPONSE_STREAM"

  dynamic "cors" {
    for_each = length(var.allowed_origins) == 0 ? [] : [var.allowed_origins]

    content {
      allow_origins = cors.value
      allow_methods = ["GET", "POST"]
      # The last lines are what OpenAI's client sends of itself in a browser (openai 7.57.0); without them it is refused.
      allow_headers = [
        "authorization", "cache-control", "content-type", "x-cache",
        "openai-organization", "openai-project", "x-stainless-arch", "x-stainless-helper-method", "x-stainless-lang",
        "x-stainless-os", "x-stainless-package-version", "x-stainless-retry-count", "x-stainless-runtime",
        "x-stainless-runtime-version", "x-stainless-timeout",
      ]
      expose_headers = [
        "retry-after", "x-cache", "x-ratelimit-limit-requests", "x-ratelimit-limit-tokens", "x-ratelimit-remaining-requests",
        "x-ratelimit-remaining-tokens", "x-ratelimit-reset-requests", "x-ratelimit-reset-tokens", "x-request-id",
        "x-should-retry",
      ]
      max_age = 3600
    }
  }
}

# A public address needs two rights, each of them for calls through the address alone.
# https://docs.aws.amazon.com/lambda/latest/dg/urls-auth.html
resource "aws_lambda_permission" "chat_url" {
  statement_id           = "url"
  action                 = "lambda:InvokeFunctionUrl"
  function_name          = module.function["chat"].name
  principal              = "*"
  function_url_auth_type = "NONE"
}

# By CloudFormation: the provider can say "through the address" since 6.29 only, and without it anybody could
# invoke the function past the address.
resource "aws_cloudformation_stack" "chat_url" {
  name = "${local.name}-chat-url"

  template_body = jsonencode({
    Resources = {
      Invoke = {
        Type = "AWS::Lambda::Permission"
        Properties = {
          Action                = "lambda:InvokeFunction"
          FunctionName          = module.function["chat"].name
          Principal             = "*"
          InvokedViaFunctionUrl = true
        }
      }
    }
  })
}
