# The page for people, where a stage has one: the files of web/ in a bucket of their own, which CloudFront
# alone reads, and the API under the same name, so that the page asks no other host over HTTP.
locals {
  # headers.json is what the page is answered with. config.json goes as it is: the API has the page's own name.
  page_files = !var.page ? {} : {
    for name in setsubtract(fileset(var.web_dir, "*.{html,css,js,json,svg}"), ["headers.json"]) :
    name => file("${var.web_dir}/${name}")
  }
  page_types = {
    html = "text/html; charset=utf-8"
    css  = "text/css; charset=utf-8"
    js   = "text/javascript; charset=utf-8"
    json = "application/json"
    svg  = "image/svg+xml"
  }
  page_headers = !var.page ? {} : jsondecode(file("${var.web_dir}/headers.json"))

  # Beside the page's own name: WebSockets, which have an address of their own, and links to maps, which
  # lead to the bucket.
  page_policy = replace(replace(
    lookup(local.page_headers, "content-security-policy", ""),
    "connect-src 'self'", "connect-src 'self' ${aws_apigatewayv2_api.socket.api_endpoint}"),
    "img-src 'self'", "img-src 'self' https://${aws_s3_bucket.blobs.bucket_regional_domain_name}"
  )

  # What the page asks of the API.
  page_api_paths = toset(var.page ? ["/submit", "/socket-tickets", "/result/*"] : [])

  # Managed by AWS, the same in every account: CachingDisabled, CachingOptimized, and AllViewerExceptHostHeader.
  not_cached      = "4135ea2d-6df8-44a3-9df3-4b5a84be39ad"
  cached          = "658327ea-f89d-4fab-a63d-7e88639e58f6"
  but_host_header = "b689b0a8-53d0-40ab-baf2-68738e2966ac"
}

resource "aws_s3_bucket" "page" {
  count = var.page ? 1 : 0

  bucket_prefix = "${local.name}-page-"
  # Nothing in it that is not in web/.
  force_destroy = true
}

resource "aws_s3_bucket_public_access_block" "page" {
  count = var.page ? 1 : 0

  bucket                  = aws_s3_bucket.page[0].id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_object" "page" {
  for_each = local.page_files

  bucket        = aws_s3_bucket.page[0].id
  key           = each.key
  content       = each.value
  content_type  = local.page_types[regex("[a-z]+$", each.key)]
  cache_control = "no-cache"
}

# CloudFront reads, for this distribution alone. It may list, or a missing file would be a 403.
resource "aws_s3_bucket_policy" "page" {
  count = var.page ? 1 : 0

  bucket = aws_s3_bucket.page[0].id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      for action, resource in { "s3:GetObject" = "${aws_s3_bucket.page[0].arn}/*", "s3:ListBucket" = aws_s3_bucket.page[0].arn } : {
        Effect                                 = "Allow"
        Principal                              = { Service = "cloudfront.amazonaws.com" }
        Action                                 = action
        Resource                               = resource
        Condition                              = { StringEquals = { "AWS:SourceArn" = aws_cloudfront_distribution.page[0].arn } }
      }
    ]
  })
}

resource "aws_cloudfront_origin_access_control" "page" {
  count = var.page ? 1 : 0

  name                              = "${local.name}-page"
  origin_access_control_origin_type = "s3"
  signing_behavior                  = "always"
  signing_protocol                  = "sigv4"
}

resource "aws_cloudfront_response_headers_policy" "page" {
  count = var.page ? 1 : 0
  name  = "${local.name}-page"

  security_headers_config {
    content_security_policy {
      content_security_policy = local.page_policy
      override                = true
    }

    content_type_options {
      override = true
    }

    referrer_policy {
      referrer_policy = local.page_headers["referrer-policy"]
      override        = true
    }

    strict_transport_security {
      access_control_max_age_sec = 31536000
      override                   = true
    }
  }

  # CloudFront has names of its own for those above.
  custom_headers_config {
    dynamic "items" {
      for_each = setsubtract(keys(local.page_headers), ["content-security-policy", "referrer-policy", "x-content-type-options"])

      content {
        header   = items.value
        value    = local.page_headers[items.value]
        override = true
      }
    }
  }
}

resource "aws_cloudfront_distribution" "page" {
  count = var.page ? 1 : 0

  comment             = "${local.name}: the page for people"
  enabled             = true
  is_ipv6_enabled     = true
  http_version        = "http2and3"
  default_root_object = "index.html"
  # Europe and North America.
  price_class = "PriceClass_100"

  origin {
    origin_id                = "page"
    domain_name              = aws_s3_bucket.page[0].bucket_regional_domain_name
    origin_access_control_id = aws_cloudfront_origin_access_control.page[0].id
  }

  origin {
    origin_id   = "api"
    domain_name = trimprefix(aws_apigatewayv2_api.http.api_endpoint, "https://")

    custom_origin_config {
      http_port              = 80
      https_port             = 443
      origin_protocol_policy = "https-only"
      origin_ssl_protocols   = ["TLSv1.2"]
      # As long as the API waits.
      origin_read_timeout = 30
    }
  }

  default_cache_behavior {
    target_origin_id           = "page"
    viewer_protocol_policy     = "redirect-to-https"
    allowed_methods            = ["GET", "HEAD"]
    cached_methods             = ["GET", "HEAD"]
    cache_policy_id            = local.cached
    response_headers_policy_id = aws_cloudfront_response_headers_policy.page[0].id
    compress                   = true
  }

  # Neither kept nor changed: keys and photos go through.
  dynamic "ordered_cache_behavior" {
    for_each = local.page_api_paths

    content {
      path_pattern             = ordered_cache_behavior.value
      target_origin_id         = "api"
      viewer_protocol_policy   = "https-only"
      allowed_methods          = ["GET", "HEAD", "OPTIONS", "PUT", "PATCH", "POST", "DELETE"]
      cached_methods           = ["GET", "HEAD"]
      cache_policy_id          = local.not_cached
      origin_request_policy_id = local.but_host_header
    }
  }

  restrictions {
    geo_restriction {
      restriction_type = "none"
    }
  }

  viewer_certificate {
    cloudfront_default_certificate = true
  }
}
