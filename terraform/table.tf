# Records, idempotency items and counters; shared/src/aws/dynamodb.rs has the layout.
resource "aws_dynamodb_table" "jobs" {
  name                        = "${local.name}-jobs"
  billing_mode                = "PAY_PER_REQUEST"
  hash_key                    = "id"
  deletion_protection_enabled = var.keep_data

  stream_enabled   = true
  stream_view_type = "NEW_IMAGE"

  attribute {
    name = "id"
    type = "S"
  }

  attribute {
    name = "due_shard"
    type = "N"
  }

  attribute {
    name = "due_at"
    type = "N"
  }

  attribute {
    name = "listed_by"
    type = "S"
  }

  # Sparse: only what sweep must look at.
  global_secondary_index {
    name            = "due"
    hash_key        = "due_shard"
    range_key       = "due_at"
    projection_type = "ALL"
  }

  # Sparse: only jobs, which their callers may list.
  global_secondary_index {
    name            = "callers"
    hash_key        = "listed_by"
    range_key       = "id"
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
