# The cache of a stage with cache = "redis": a serverless Valkey, and a network for it that only
# inference joins. There is no way out of it to the internet: S3 and DynamoDB, the queue and the secret
# are reached through endpoints. KMS needs none: the services call it, not the function.
locals {
  redis          = var.cache == "redis" ? 1 : 0
  redis_urls     = [for cache in aws_elasticache_serverless_cache.outputs : "rediss://${cache.endpoint[0].address}:${cache.endpoint[0].port}"]
  cache_networks = [for group in aws_security_group.inference : { subnet_ids = aws_subnet.cache[*].id, security_group_ids = [group.id] }]
  https_port     = 443
  # Writing, and reading from replicas.
  redis_ports = { from = 6379, to = 6380 }
}

data "aws_availability_zones" "here" {
  count = local.redis
  state = "available"
}

resource "aws_vpc" "cache" {
  count                = local.redis
  cidr_block           = "10.20.0.0/24"
  enable_dns_hostnames = true
  tags                 = { Name = local.name }
}

resource "aws_subnet" "cache" {
  count             = 2 * local.redis
  vpc_id            = aws_vpc.cache[0].id
  cidr_block        = cidrsubnet(aws_vpc.cache[0].cidr_block, 1, count.index)
  availability_zone = data.aws_availability_zones.here[0].names[count.index]
  tags              = { Name = "${local.name}-${count.index}" }
}

resource "aws_route_table" "cache" {
  count  = local.redis
  vpc_id = aws_vpc.cache[0].id
  tags   = { Name = local.name }
}

resource "aws_route_table_association" "cache" {
  count          = 2 * local.redis
  subnet_id      = aws_subnet.cache[count.index].id
  route_table_id = aws_route_table.cache[0].id
}

resource "aws_vpc_endpoint" "gateway" {
  for_each        = toset(local.redis == 1 ? ["dynamodb", "s3"] : [])
  vpc_id          = aws_vpc.cache[0].id
  service_name    = "com.amazonaws.${var.region}.${each.key}"
  route_table_ids = aws_route_table.cache[*].id
  tags            = { Name = "${local.name}-${each.key}" }
}

resource "aws_vpc_endpoint" "interface" {
  for_each            = toset(local.redis == 1 ? ["secretsmanager", "sqs"] : [])
  vpc_id              = aws_vpc.cache[0].id
  vpc_endpoint_type   = "Interface"
  service_name        = "com.amazonaws.${var.region}.${each.key}"
  private_dns_enabled = true
  subnet_ids          = aws_subnet.cache[*].id
  security_group_ids  = aws_security_group.endpoints[*].id
  tags                = { Name = "${local.name}-${each.key}" }
}

resource "aws_security_group" "inference" {
  count       = local.redis
  name        = "${local.name}-inference"
  description = "Inference: out to the cache and to AWS, nothing in."
  vpc_id      = aws_vpc.cache[0].id
}

resource "aws_security_group" "endpoints" {
  count       = local.redis
  name        = "${local.name}-endpoints"
  description = "Queue and secret, for inference."
  vpc_id      = aws_vpc.cache[0].id
}

resource "aws_security_group" "cache" {
  count       = local.redis
  name        = "${local.name}-cache"
  description = "The cache, for inference."
  vpc_id      = aws_vpc.cache[0].id
}

resource "aws_vpc_security_group_egress_rule" "to_cache" {
  count                        = local.redis
  security_group_id            = aws_security_group.inference[0].id
  referenced_security_group_id = aws_security_group.cache[0].id
  ip_protocol                  = "tcp"
  from_port                    = local.redis_ports.from
  to_port                      = local.redis_ports.to
}

resource "aws_vpc_security_group_ingress_rule" "from_inference_to_cache" {
  count                        = local.redis
  security_group_id            = aws_security_group.cache[0].id
  referenced_security_group_id = aws_security_group.inference[0].id
  ip_protocol                  = "tcp"
  from_port                    = local.redis_ports.from
  to_port                      = local.redis_ports.to
}

resource "aws_vpc_security_group_egress_rule" "to_endpoints" {
  count                        = local.redis
  security_group_id            = aws_security_group.inference[0].id
  referenced_security_group_id = aws_security_group.endpoints[0].id
  ip_protocol                  = "tcp"
  from_port                    = local.https_port
  to_port                      = local.https_port
}

resource "aws_vpc_security_group_ingress_rule" "from_inference_to_endpoints" {
  count                        = local.redis
  security_group_id            = aws_security_group.endpoints[0].id
  referenced_security_group_id = aws_security_group.inference[0].id
  ip_protocol                  = "tcp"
  from_port                    = local.https_port
  to_port                      = local.https_port
}

# S3 and DynamoDB keep their public addresses behind a gateway endpoint.
resource "aws_vpc_security_group_egress_rule" "to_gateways" {
  for_each          = aws_vpc_endpoint.gateway
  security_group_id = aws_security_group.inference[0].id
  prefix_list_id    = each.value.prefix_list_id
  ip_protocol       = "tcp"
  from_port         = local.https_port
  to_port           = local.https_port
}

resource "aws_elasticache_serverless_cache" "outputs" {
  count              = local.redis
  name               = local.name
  description        = "Raw outputs of the model, under an HMAC."
  engine             = "valkey"
  subnet_ids         = aws_subnet.cache[*].id
  security_group_ids = aws_security_group.cache[*].id
  kms_key_id         = aws_kms_key.data.arn

  # Bounds of the bill: some kilobytes a photo, kept as long as the photo.
  cache_usage_limits {
    data_storage {
      maximum = 1
      unit    = "GB"
    }

    ecpu_per_second {
      maximum = 1000
    }
  }
}
