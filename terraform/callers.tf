# API keys, their accounts and the counts of requests; shared/src/aws/callers.rs has the layout. Apart from the jobs:
# counting must not pass through their stream.
resource "aws_dynamodb_table" "callers" {
  name                        = "${local.name}-callers"
  billing_mode                = "PAY_PER_REQUEST"
  hash_key                    = "id"
  deletion_protection_enabled = var.keep_data

  attribute {
    name = "id"
    type = "S"
  }

  attribute {
    name = "listed"
    type = "S"
  }

  attribute {
    name = "created_at"
    type = "N"
  }

  # Sparse: only keys.
  global_secondary_index {
    name            = "keys"
    hash_key        = "listed"
    range_key       = "created_at"
    projection_type = "ALL"
  }

  ttl {
    attribute_name = "ttl"
    enabled        = true
  }

  point_in_time_recovery {
    enabled = true
  }

  server_side_encryption {
    enabled     = true
    kms_key_arn = aws_kms_key.data.arn
  }
}
