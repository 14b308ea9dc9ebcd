provider "aws" {
  region = var.region

  access_key                  = var.emulator_url == null ? null : "test"
  secret_key                  = var.emulator_url == null ? null : "test"
  s3_use_path_style           = var.emulator_url != null
  skip_credentials_validation = var.emulator_url != null
  skip_metadata_api_check     = var.emulator_url != null
  skip_requesting_account_id  = var.emulator_url != null

  dynamic "endpoints" {
    for_each = var.emulator_url == null ? [] : [var.emulator_url]

    content {
      apigatewayv2   = endpoints.value
      budgets        = endpoints.value
      cloudformation = endpoints.value
      cloudfront     = endpoints.value
      cloudwatch     = endpoints.value
      dynamodb       = endpoints.value
      ec2            = endpoints.value
      elasticache    = endpoints.value
      events         = endpoints.value
      iam            = endpoints.value
      kms            = endpoints.value
      lambda         = endpoints.value
      logs           = endpoints.value
      s3             = endpoints.value
      secretsmanager = endpoints.value
      sns            = endpoints.value
      sqs            = endpoints.value
      sts            = endpoints.value
    }
  }

  default_tags {
    tags = {
      project = "lesion"
      stage   = var.stage
    }
  }
}
