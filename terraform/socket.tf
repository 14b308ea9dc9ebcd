# The WebSocket API, and the table of who is connected; shared/src/aws/connections.rs has its layout.
# Who may connect is known by the ticket, which the function checks.
locals {
  socket_stage  = "live"
  socket_routes = ["$connect", "$default", "$disconnect"]

  # The emulator serves both below its own address.
  socket_path    = "_aws/execute-api/${aws_apigatewayv2_api.socket.id}/${local.socket_stage}"
  socket_url     = var.emulator_url == null ? "${aws_apigatewayv2_api.socket.api_endpoint}/${local.socket_stage}" : "${replace(var.emulator_url, "/^http/", "ws")}/${local.socket_path}"
  socket_api_url = replace(local.socket_url, "/^ws/", "http")

  # Of an emulator the provider knows no account, and leaves it out.
  socket_arn = var.emulator_url == null ? aws_apigatewayv2_api.socket.execution_arn : replace(aws_apigatewayv2_api.socket.execution_arn, "::", ":000000000000:")

  # Of those that send frames.
  push_environment       = { SOCKET_API_URL = local.socket_api_url }
  connection_environment = { CONNECTIONS_TABLE_NAME = aws_dynamodb_table.connections.name }
}

resource "aws_apigatewayv2_api" "socket" {
  name                       = "${local.name}-socket"
  protocol_type              = "WEBSOCKET"
  route_selection_expression = "$request.body.action"
}

resource "aws_apigatewayv2_integration" "socket" {
  api_id             = aws_apigatewayv2_api.socket.id
  integration_type   = "AWS_PROXY"
  integration_method = "POST"
  integration_uri    = module.function["socket"].invoke_arn
}

resource "aws_apigatewayv2_route" "socket" {
  for_each = toset(local.socket_routes)

  api_id    = aws_apigatewayv2_api.socket.id
  route_key = each.key
  target    = "integrations/${aws_apigatewayv2_integration.socket.id}"
}

resource "aws_lambda_permission" "socket" {
  statement_id  = "socket"
  action        = "lambda:InvokeFunction"
  function_name = module.function["socket"].name
  principal     = "apigateway.amazonaws.com"
  source_arn    = "${aws_apigatewayv2_api.socket.execution_arn}/${local.socket_stage}/*"
}

# Without an access log: for a WebSocket API that takes a role of the whole account, which is not this
# stage's to set. The function logs what comes.
resource "aws_apigatewayv2_stage" "socket" {
  api_id      = aws_apigatewayv2_api.socket.id
  name        = local.socket_stage
  auto_deploy = true

  default_route_settings {
    throttling_rate_limit  = var.throttle.requests_per_second
    throttling_burst_limit = var.throttle.burst
  }

  # The stage cannot be deployed before there is a route.
  depends_on = [aws_apigatewayv2_route.socket]
}

# Nothing in it lives for longer than a connection, so nothing is kept.
resource "aws_dynamodb_table" "connections" {
  name         = "${local.name}-connections"
  billing_mode = "PAY_PER_REQUEST"
  hash_key     = "id"
  range_key    = "part"

  attribute {
    name = "id"
    type = "S"
  }

  attribute {
    name = "part"
    type = "S"
  }

  ttl {
    attribute_name = "ttl"
    enabled        = true
  }

  server_side_encryption {
    enabled     = true
    kms_key_arn = aws_kms_key.data.arn
  }
}
