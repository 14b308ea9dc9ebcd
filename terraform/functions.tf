# Every function in one map: its size, what it is told, what it may do. What calls it is in api.tf
# and triggers.tf.
locals {
  names = jsondecode(file("${path.module}/names.json"))

  # No claim outlives the longest invocation of a function that claims. One of enrichment's may be as
  # long as a prompt takes; the claim on a description ends with LEASE_SECONDS.
  lease_seconds              = max(var.function_timeout_seconds, var.enrichment_timeout_seconds)
  enrichment_timeout_seconds = max(var.enrichment_timeout_seconds, local.has_llm ? var.prompt_timeout_seconds : 0)

  # Of all functions.
  environment = {
    STAGE                = var.stage
    TABLE_NAME           = aws_dynamodb_table.jobs.name
    LOG_LEVEL            = var.log_level
    MAX_ATTEMPTS         = var.max_attempts
    LEASE_SECONDS        = local.lease_seconds
    PROMPT_LEASE_SECONDS = local.enrichment_timeout_seconds
    REDISPATCH_SECONDS   = var.redispatch_seconds
    BACKOFF_SECONDS      = var.backoff_seconds
    DEADLINE_HOURS       = var.deadline_hours
    PHOTO_TTL_DAYS       = var.photo_ttl_days
    RESULT_TTL_DAYS      = var.result_ttl_days
  }
  queue_environment = { QUEUE_URL = aws_sqs_queue.jobs.url }
  blob_environment = {
    BUCKET        = aws_s3_bucket.blobs.bucket
    S3_PATH_STYLE = var.emulator_url == null ? null : "true"
  }
  caller_environment = {
    CALLERS_TABLE_NAME        = aws_dynamodb_table.callers.name
    ADMIT_GUESTS              = var.admit_guests
    JWT_ISSUER                = var.jwt_issuer
    JWT_AUDIENCE              = var.jwt_audience
    REQUESTS_PER_MINUTE       = var.requests_per_minute
    GUEST_REQUESTS_PER_MINUTE = var.guest_requests_per_minute
  }
  # Made by scripts/package --with-model.
  other_packages     = var.model_uri == "package" ? { inference = "inference-with-model" } : {}
  secret_environment = { SECRET_ARN = aws_secretsmanager_secret.functions.arn }
  # Which LLM there is, if any; submit and socket are told as much, and take prompts; so is inference, which else describes.
  has_llm = var.llm_base_url != null || var.bedrock_agent != null
  llm_name = {
    LLM_BASE_URL     = var.llm_base_url
    BEDROCK_AGENT_ID = try(var.bedrock_agent.agent_id, null)
  }
  # Without a server its settings are of no use, and refused.
  llm_environment = !local.has_llm ? {} : merge(local.llm_name, {
    LLM_MODEL                      = var.llm_model
    LLM_MAX_TOKENS                 = var.llm_base_url == null ? null : var.llm_max_tokens
    LLM_TEMPERATURE                = var.llm_base_url == null ? null : var.llm_temperature
    LLM_TIMEOUT_SECONDS            = var.llm_timeout_seconds
    LLM_PROMPT_USD_PER_MILLION     = var.llm_prompt_usd_per_million
    LLM_COMPLETION_USD_PER_MILLION = var.llm_completion_usd_per_million
    BEDROCK_AGENT_ALIAS_ID         = try(var.bedrock_agent.alias_id, null)
    BEDROCK_AGENT_MEMORY           = try(var.bedrock_agent.has_memory, null)
  })
  # Which models the proxy has, where it is not the one of the LLM.
  models_environment = length(var.llm_models) == 0 ? {} : {
    LLM_MODELS = jsonencode({
      models = { for alias, it in var.llm_models : alias => { for field, value in it : field => value if value != null } }
    })
  }

  functions = {
    submit = {
      # Shows each photo to a decoder.
      memory_mb       = 1024
      timeout_seconds = local.http_timeout_seconds
      environment = merge(
        local.queue_environment, local.blob_environment, local.caller_environment, local.llm_name,
        local.webhook_hosts_environment, { MAX_QUEUED_MB = var.max_queued_mb },
      )
      permissions = concat(local.may_submit, local.may_check_callers)
    }
    result = {
      memory_mb       = 256
      timeout_seconds = local.http_timeout_seconds
      environment     = merge(local.queue_environment, local.blob_environment, local.caller_environment)
      permissions     = concat(local.may_answer, local.may_check_callers)
    }
    admin = {
      memory_mb       = 256
      timeout_seconds = local.http_timeout_seconds
      environment = merge(local.queue_environment, local.webhook_letters_environment, local.caller_environment, {
        DEAD_LETTER_QUEUE_URL = aws_sqs_queue.dead_letters.url
      })
      permissions = local.may_administer
    }
    inference = {
      # One whole processor, and the 640 MiB of the largest photo beside the model.
      memory_mb       = 1769
      timeout_seconds = var.function_timeout_seconds
      environment = merge(local.queue_environment, local.blob_environment, local.secret_environment, local.llm_name, {
        MODEL_DIGEST = var.model_digest
        MODEL_URI    = var.model_uri
        CACHE        = var.cache
        REDIS_URL    = one(local.redis_urls)
      })
      permissions = concat(local.may_infer, local.may_read_cache_key, local.may_cache, local.may_join_network)
    }
    enrichment = {
      memory_mb       = 256
      timeout_seconds = local.enrichment_timeout_seconds
      environment = merge(
        local.blob_environment, local.secret_environment, local.llm_environment, local.push_environment,
        local.prompt_queue_environment,
      )
      permissions = concat(local.may_enrich, local.may_push, local.may_invoke_agent)
    }
    socket = {
      memory_mb       = 256
      timeout_seconds = local.http_timeout_seconds
      environment = merge(
        local.queue_environment, local.blob_environment, local.caller_environment, local.llm_name,
        local.push_environment, local.connection_environment,
        { MAX_QUEUED_MB = var.max_queued_mb, SOCKET_URL = local.socket_url },
      )
      permissions = concat(local.may_connect, local.may_push, local.may_check_callers)
    }
    notify = {
      memory_mb       = 256
      timeout_seconds = 30
      environment     = merge(local.push_environment, local.connection_environment, local.webhook_queue_environment)
      permissions     = concat(local.may_notify, local.may_push)
    }
    webhook = {
      memory_mb       = 256
      timeout_seconds = local.webhook_timeout_seconds
      environment     = merge(local.webhook_letters_environment, local.webhook_hosts_environment, local.secret_environment)
      permissions     = local.may_deliver
    }
    chat = {
      memory_mb = 256
      # Lambda's longest: an LLM takes its time, and says when it is over.
      timeout_seconds = 900
      environment     = merge(local.secret_environment, local.llm_environment, local.models_environment, local.caller_environment)
      permissions     = concat(local.may_chat, local.may_invoke_agent, local.may_check_callers)
    }
    sweep = {
      memory_mb       = 256
      timeout_seconds = 60
      environment     = merge(local.queue_environment, local.webhook_letters_environment, local.blob_environment)
      permissions     = local.may_sweep
    }
  }
}

module "function" {
  source   = "./modules/function"
  for_each = local.functions

  name                 = "${local.name}-${each.key}"
  package              = "${var.packages_dir}/${lookup(local.other_packages, each.key, each.key)}.zip"
  architecture         = var.architecture
  memory_mb            = each.value.memory_mb
  timeout_seconds      = each.value.timeout_seconds
  environment          = merge(local.environment, each.value.environment)
  permissions          = concat(each.value.permissions, local.may_use_key)
  log_retention_days   = var.log_retention_days
  reserved_concurrency = lookup(var.reserved_concurrency, each.key, null)
  network              = each.key == "inference" ? one(local.cache_networks) : null
}
