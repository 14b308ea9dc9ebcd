# Photos under jobs/, uploads under incoming/, outputs under cache/, model bundles under models/.
resource "aws_s3_bucket" "blobs" {
  bucket_prefix = "${local.name}-blobs-"
  force_destroy = !var.keep_data
}

resource "aws_s3_bucket_public_access_block" "blobs" {
  bucket                  = aws_s3_bucket.blobs.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_server_side_encryption_configuration" "blobs" {
  bucket = aws_s3_bucket.blobs.id

  rule {
    bucket_key_enabled = true

    apply_server_side_encryption_by_default {
      sse_algorithm     = "aws:kms"
      kms_master_key_id = aws_kms_key.data.arn
    }
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "blobs" {
  bucket = aws_s3_bucket.blobs.id

  rule {
    id     = "photos"
    status = "Enabled"

    filter {
      prefix = "jobs/"
    }

    expiration {
      days = var.photo_ttl_days
    }
  }

  rule {
    id     = "outputs"
    status = "Enabled"

    filter {
      prefix = "cache/"
    }

    expiration {
      days = var.photo_ttl_days
    }
  }

  # Sweep erases uploads after an hour; this takes what came later still.
  rule {
    id     = "uploads"
    status = "Enabled"

    filter {
      prefix = "incoming/"
    }

    expiration {
      days = 1
    }

    abort_incomplete_multipart_upload {
      days_after_initiation = 1
    }
  }
}

# Pages upload larger photos to the bucket itself.
resource "aws_s3_bucket_cors_configuration" "blobs" {
  count  = length(var.allowed_origins) == 0 ? 0 : 1
  bucket = aws_s3_bucket.blobs.id

  cors_rule {
    allowed_origins = var.allowed_origins
    allowed_methods = ["PUT"]
    allowed_headers = ["content-type", "x-amz-checksum-sha256"]
    max_age_seconds = 3600
  }
}
