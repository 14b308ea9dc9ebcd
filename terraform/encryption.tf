# One key for all that holds photos, results or their ids.
resource "aws_kms_key" "data" {
  description             = "${local.name}: photos, records, queue"
  enable_key_rotation     = true
  deletion_window_in_days = 30
}

resource "aws_kms_alias" "data" {
  name          = "alias/${local.name}"
  target_key_id = aws_kms_key.data.key_id
}
