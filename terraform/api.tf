# The HTTP API. Callers are checked in the functions, the same on both hosts.
locals {
  # An HTTP API gives up after 30 seconds.
  http_timeout_seconds = 29

  routes = {
    "GET /healthz"         = "result"
    "GET /openapi.json"    = "result"
    "POST /submit"         = "submit"
    "POST /uploads"        = "submit"
    "POST /socket-tickets" = "socket"
    "GET /result"          = "result"
    "GET /result/{id}"     = "result"
    "DELETE /result/{id}"  = "result"
    "GET /results"         = "result"
    "ANY /admin"           = "admin"
    "ANY /admin/{proxy+}"  = "admin"
  }
}

resource "aws_apigatewayv2_api" "http" {
  name          = local.name
  protocol_type = "HTTP"

  dynamic "cors_configuration" {
    for_each = length(var.allowed_origins) == 0 ? [] : [var.allowed_origins]

    content {
      allow_origins  = cors_configuration.value
      allow_methods  = ["GET", "POST", "DELETE"]
      allow_headers  = ["authorization", "content-type", "idempotency-key", "if-none-match"]
      expose_headers = ["etag", "location", "retry-after", "x-request-id"]
      max_age        = 3600
    }
  }
}

resource "aws_apigatewayv2_integration" "function" {
  for_each = toset(values(local.routes))

  api_id                 = aws_apigatewayv2_api.http.id
  integration_type       = "AWS_PROXY"
  integration_uri        = module.function[each.key].invoke_arn
  payload_format_version = "2.0"
}

resource "aws_apigatewayv2_route" "function" {
  for_each = local.routes

  api_id    = aws_apigatewayv2_api.http.id
  route_key = each.key
  target    = "integrations/${aws_apigatewayv2_integration.function[each.value].id}"
}

resource "aws_lambda_permission" "api" {
  for_each = toset(values(local.routes))

  statement_id  = "api"
  action        = "lambda:InvokeFunction"
  function_name = module.function[each.key].name
  principal     = "apigateway.amazonaws.com"
  source_arn    = "${aws_apigatewayv2_api.http.execution_arn}/*/*"
}

resource "aws_cloudwatch_log_group" "api" {
  name              = "/aws/vendedlogs/${local.name}-api"
  retention_in_days = var.log_retention_days
}

resource "aws_apigatewayv2_stage" "default" {
  api_id      = aws_apigatewayv2_api.http.id
  name        = "$default"
  auto_deploy = true

  default_route_settings {
    throttling_rate_limit  = var.throttle.requests_per_second
    throttling_burst_limit = var.throttle.burst
  }

  # The route and not the path: no id, no query string, no address, no body.
  access_log_settings {
    destination_arn = aws_cloudwatch_log_group.api.arn

    format = jsonencode({
      time             = "$context.requestTimeEpoch"
      api_request_id   = "$context.requestId"
      route            = "$context.routeKey"
      status           = "$context.status"
      response_bytes   = "$context.responseLength"
      latency_ms       = "$context.responseLatency"
      function_ms      = "$context.integrationLatency"
      integration_code = "$context.integrationStatus"
      # Of the gateway itself; what a function answers is its own affair.
      error = "$context.error.responseType"
    })
  }

  # The stage cannot be deployed before there is a route.
  depends_on = [aws_apigatewayv2_route.function]
}
