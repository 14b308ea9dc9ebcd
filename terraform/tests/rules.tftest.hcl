# The rules that a stage must keep, on a plan of each stage. AWS is made up: no account is needed.
#
#   scripts/check-terraform

mock_provider "aws" {
  source          = "./tests/mocks"
  override_during = plan
}

variables {
  stage        = "dev"
  use_api_keys = true
  model_digest = "0000000000000000000000000000000000000000000000000000000000000000"
  packages_dir = "tests/packages"
}

run "a_message_is_hidden_six_times_as_long_as_an_invocation_may_take" {
  command = plan

  variables {
    function_timeout_seconds = 90
    max_attempts             = 7
  }

  assert {
    condition     = aws_sqs_queue.jobs.visibility_timeout_seconds >= 6 * local.functions["inference"].timeout_seconds
    error_message = "Lambda would hand out messages twice while they are worked."
  }

  assert {
    condition     = jsondecode(aws_sqs_queue.jobs.redrive_policy).maxReceiveCount > 7
    error_message = "The queue would give a job up before its own attempts are used up."
  }

  assert {
    condition     = local.environment.LEASE_SECONDS >= max(local.functions["inference"].timeout_seconds, var.enrichment_timeout_seconds)
    error_message = "A claim would run out under a worker."
  }
}

run "a_prompt_has_minutes_where_there_is_an_llm_and_a_description_does_not" {
  command = plan

  variables {
    llm_base_url = "https://llm.example/v1"
    llm_model    = "m"
  }

  assert {
    condition = (
      local.functions["enrichment"].timeout_seconds >= 300
      && local.environment.PROMPT_LEASE_SECONDS == local.functions["enrichment"].timeout_seconds
    )
    error_message = "The answer to a prompt would be cut off."
  }

  assert {
    condition     = local.environment.LEASE_SECONDS == var.enrichment_timeout_seconds
    error_message = "A description whose worker died would wait for as long as a prompt may take."
  }

  assert {
    condition     = local.functions["submit"].environment.LLM_BASE_URL == local.functions["enrichment"].environment.LLM_BASE_URL
    error_message = "Submit would refuse prompts."
  }

  assert {
    condition     = local.functions["inference"].environment.LLM_BASE_URL == local.functions["enrichment"].environment.LLM_BASE_URL
    error_message = "The template would describe what the LLM is to."
  }

  assert {
    condition     = aws_cloudwatch_metric_alarm.this["prompt-age"].threshold > aws_sqs_queue.prompts.visibility_timeout_seconds
    error_message = "One slow answer would raise an alarm, or one death of the function."
  }

  assert {
    condition = (
      aws_cloudwatch_metric_alarm.this["iterator-age"].threshold > 1000 * min(local.environment.LEASE_SECONDS, local.functions["enrichment"].timeout_seconds)
      && aws_cloudwatch_metric_alarm.this["iterator-age"].threshold < 1000 * local.functions["enrichment"].timeout_seconds
    )
    error_message = "One slow description would raise an alarm, or none would while prompts are worked in the stream again."
  }

  assert {
    condition = (
      aws_sqs_queue.prompts.visibility_timeout_seconds > local.functions["enrichment"].timeout_seconds
      && aws_lambda_event_source_mapping.prompts.batch_size == 1
      && aws_lambda_event_source_mapping.prompts.scaling_config[0].maximum_concurrency == var.max_concurrent_prompts
    )
    error_message = "A prompt would be handed out twice while it is answered, or wait for another."
  }

  assert {
    condition     = jsondecode(aws_sqs_queue.prompts.redrive_policy).deadLetterTargetArn == aws_sqs_queue.enrichment_failures.arn
    error_message = "What is given up would leave no trace."
  }
}

run "the_streams_mapping_loses_nothing_and_waits_for_nobody" {
  command = plan

  assert {
    condition     = aws_lambda_event_source_mapping.enrichment.starting_position == "TRIM_HORIZON"
    error_message = "Changes from before the mapping would be lost."
  }

  assert {
    condition = (
      aws_lambda_event_source_mapping.enrichment.batch_size == 10
      && aws_lambda_event_source_mapping.enrichment.parallelization_factor == 10
      && aws_lambda_event_source_mapping.enrichment.bisect_batch_on_function_error
      && aws_lambda_event_source_mapping.enrichment.maximum_retry_attempts > 0
      && aws_lambda_event_source_mapping.enrichment.maximum_retry_attempts < 10
      && aws_lambda_event_source_mapping.enrichment.maximum_record_age_in_seconds > 0
    )
    error_message = "One bad change would hold up a shard for a day."
  }

  assert {
    condition     = aws_lambda_event_source_mapping.enrichment.destination_config[0].on_failure[0].destination_arn != ""
    error_message = "What is given up would leave no trace."
  }

  assert {
    condition     = one(one(aws_lambda_event_source_mapping.enrichment.filter_criteria).filter).pattern == "{\"dynamodb\":{\"NewImage\":{\"dispatch\":{\"S\":[\"enrichment\"]}}}}"
    error_message = "The filter is not what the code writes."
  }
}

run "the_stream_has_two_readers_and_only_records_reach_notify" {
  command = plan

  assert {
    condition     = one(one(aws_lambda_event_source_mapping.notify.filter_criteria).filter).pattern == "{\"dynamodb\":{\"NewImage\":{\"claim\":{\"N\":[{\"exists\":true}]}}}}"
    error_message = "Counters and keys would be told of as well."
  }

  assert {
    condition     = aws_lambda_event_source_mapping.notify.maximum_retry_attempts < 10 && aws_lambda_event_source_mapping.notify.bisect_batch_on_function_error
    error_message = "One frame that cannot be sent would hold up a shard."
  }
}

run "a_webhook_has_its_own_queue_whose_receives_count_no_tries" {
  command = plan

  variables {
    webhook_hosts = ["hooks.example", "other.example:8443"]
  }

  assert {
    condition     = jsondecode(aws_sqs_queue.webhooks.redrive_policy).maxReceiveCount == local.names.webhook_receives
    error_message = "The queue would give up what the function still tries."
  }

  assert {
    condition     = aws_sqs_queue.webhooks.visibility_timeout_seconds >= 6 * local.functions["webhook"].timeout_seconds
    error_message = "Lambda would hand out messages twice while they are worked."
  }

  assert {
    condition = (
      local.functions["submit"].environment.WEBHOOK_HOSTS == "hooks.example,other.example:8443"
      && local.functions["webhook"].environment.WEBHOOK_HOSTS == local.functions["submit"].environment.WEBHOOK_HOSTS
    )
    error_message = "Submit would take what webhook refuses."
  }
}

run "a_webhook_host_is_no_url" {
  command = plan

  variables {
    webhook_hosts = ["https://hooks.example/"]
  }

  expect_failures = [var.webhook_hosts]
}

run "a_socket_is_opened_at_the_address_that_a_ticket_names" {
  command = plan

  assert {
    condition = (
      local.functions["socket"].environment.SOCKET_URL == "wss://a.example/live"
      && local.functions["notify"].environment.SOCKET_API_URL == "https://a.example/live"
    )
    error_message = "Clients would be sent elsewhere, or frames."
  }

  assert {
    condition     = sort(keys(aws_apigatewayv2_route.socket)) == tolist(["$connect", "$default", "$disconnect"])
    error_message = "What a client says would reach nobody."
  }
}

run "each_mapping_reports_single_items" {
  command = plan

  assert {
    condition = alltrue([
      for mapping in [aws_lambda_event_source_mapping.inference, aws_lambda_event_source_mapping.enrichment, aws_lambda_event_source_mapping.prompts, aws_lambda_event_source_mapping.notify, aws_lambda_event_source_mapping.webhook] :
      contains(mapping.function_response_types, "ReportBatchItemFailures")
    ])
    error_message = "One failure would repeat its whole batch."
  }

  assert {
    condition     = aws_lambda_event_source_mapping.inference.batch_size == 1
    error_message = "Inference takes one photo at a time."
  }
}

run "every_alarm_has_its_section_in_the_runbook" {
  command = plan

  assert {
    condition     = [for section in distinct(values(local.runbook)) : section if !strcontains(file("../docs/RUNBOOK.md"), "\n## ${section}\n")] == []
    error_message = "Without a section in docs/RUNBOOK.md: ${join(", ", [for section in distinct(values(local.runbook)) : section if !strcontains(file("../docs/RUNBOOK.md"), "\n## ${section}\n")])}."
  }
}

run "every_alarm_on_the_codes_metrics_names_one_that_the_code_emits" {
  command = plan

  assert {
    condition = [
      for key, it in aws_cloudwatch_metric_alarm.this : key
      if !startswith(it.namespace, "AWS/") && (
        it.namespace != local.names.metric_namespace
        || !contains(values(local.names.metrics), it.metric_name)
        || it.dimensions != tomap({ STAGE = "dev" })
      )
    ] == []
    error_message = "The alarm would wait for a metric that nobody writes."
  }

  assert {
    condition     = aws_cloudwatch_metric_alarm.this["stuck-jobs"].metric_name == "StuckJobs" && aws_cloudwatch_metric_alarm.this["llm-failures"].metric_name == "LlmFailures"
    error_message = "Two alarms have changed their metrics."
  }

  assert {
    condition     = [for key, it in aws_cloudwatch_metric_alarm.this : key if it.treat_missing_data != "notBreaching"] == ["stuck-jobs"]
    error_message = "Nobody would hear that sweep does not run."
  }
}

run "the_access_log_holds_no_path_query_or_address" {
  command = plan

  assert {
    condition     = !can(regex("path|query|body|sourceIp|header|authorizer", aws_apigatewayv2_stage.default.access_log_settings[0].format))
    error_message = "Ids, addresses or contents would be logged."
  }
}

run "blobs_are_private_encrypted_and_expire" {
  command = plan

  assert {
    condition = (
      aws_s3_bucket_public_access_block.blobs.block_public_acls
      && aws_s3_bucket_public_access_block.blobs.block_public_policy
      && aws_s3_bucket_public_access_block.blobs.ignore_public_acls
      && aws_s3_bucket_public_access_block.blobs.restrict_public_buckets
    )
    error_message = "Photos could be made public."
  }

  assert {
    condition = alltrue([
      for prefix in ["jobs/", "incoming/", "cache/"] : anytrue([
        for rule in aws_s3_bucket_lifecycle_configuration.blobs.rule :
        rule.filter[0].prefix == prefix && rule.expiration[0].days > 0 && rule.expiration[0].days <= var.photo_ttl_days
      ])
    ])
    error_message = "Photos, uploads or outputs would stay for ever."
  }
}

run "a_stage_without_redis_has_no_network" {
  command = plan

  assert {
    condition     = length(aws_vpc.cache) == 0 && alltrue([for key, it in module.function : length(it.subnet_ids) == 0])
    error_message = "A network costs money and does nothing here."
  }
}

run "with_redis_inference_alone_joins_the_network" {
  command = plan

  variables {
    cache = "redis"
  }

  assert {
    condition     = [for key, it in module.function : key if length(it.subnet_ids) > 0] == ["inference"]
    error_message = "The others reach no LLM from inside."
  }

  assert {
    condition     = local.functions.inference.environment.REDIS_URL == "rediss://cache.example:6379"
    error_message = "Inference does not know the cache, or talks to it in clear."
  }
}

run "chat_is_open_through_its_address_alone" {
  command = plan

  assert {
    condition = (
      aws_lambda_permission.chat_url.action == "lambda:InvokeFunctionUrl"
      && aws_lambda_permission.chat_url.function_url_auth_type == "NONE"
      && jsondecode(aws_cloudformation_stack.chat_url.template_body).Resources.Invoke.Properties.InvokedViaFunctionUrl
    )
    error_message = "Anybody could invoke the function past its address."
  }

  assert {
    condition     = [for key, it in aws_lambda_permission.api : key if it.principal == "*"] == []
    error_message = "A function is open to everybody."
  }

  assert {
    condition     = aws_lambda_function_url.chat.invoke_mode == "RESPONSE_STREAM" && !contains(values(local.routes), "chat")
    error_message = "An answer would be held back, or cut off after 30 seconds."
  }
}

run "two_llms_are_refused" {
  command = plan

  variables {
    llm_base_url  = "https://llm.example/v1"
    llm_model     = "m"
    bedrock_agent = { agent_id = "AGENT12345", alias_id = "TSTALIASID" }
  }

  expect_failures = [var.bedrock_agent]
}

run "chat_alone_is_told_of_the_models_and_no_key_is_among_what_it_is_told" {
  command = plan

  variables {
    llm_models = {
      fast = { base_url = "https://llm.example/v1", model = "m", api_key_name = "FAST_KEY", fallback = "slow", prompt_usd_per_million = 0.4, completion_usd_per_million = 1.6 }
      slow = { base_url = "http://10.0.0.1/v1", fallback = null, timeout_seconds = 300 }
    }
  }

  assert {
    condition = jsondecode(local.functions["chat"].environment.LLM_MODELS) == { models = {
      fast = { base_url = "https://llm.example/v1", model = "m", api_key_name = "FAST_KEY", fallback = "slow", prompt_usd_per_million = 0.4, completion_usd_per_million = 1.6 }
      slow = { base_url = "http://10.0.0.1/v1", timeout_seconds = 300 }
    } }
    error_message = "chat would know other models than those that were set."
  }

  assert {
    condition     = [for key, it in local.functions : key if can(it.environment.LLM_MODELS)] == ["chat"]
    error_message = "Others have nothing to do with the proxy's models."
  }

  assert {
    condition     = output.llm_key_names == "FAST_KEY"
    error_message = "scripts/deploy would not ask for the models' keys."
  }
}

run "without_models_chat_has_the_one_of_the_llm" {
  command = plan

  assert {
    condition     = !can(local.functions["chat"].environment.LLM_MODELS)
    error_message = "An empty list of models keeps chat from starting."
  }
}

run "a_models_unknown_field_is_refused" {
  command = plan

  variables {
    llm_models = { fast = { base_url = "https://llm.example/v1", api_key = "sk-x" } }
  }

  expect_failures = [var.llm_models]
}

run "a_model_without_a_server_is_refused" {
  command = plan

  variables {
    llm_models = { fast = { model = "m" } }
  }

  expect_failures = [var.llm_models]
}

run "a_model_that_stands_in_for_itself_is_refused" {
  command = plan

  variables {
    llm_models = { fast = { base_url = "https://llm.example/v1", fallback = "fast" } }
  }

  expect_failures = [var.llm_models]
}

run "half_of_a_models_prices_is_refused" {
  command = plan

  variables {
    llm_models = { fast = { base_url = "https://llm.example/v1", prompt_usd_per_million = 1 } }
  }

  expect_failures = [var.llm_models]
}

run "a_model_is_not_sent_what_the_stage_signs_with" {
  command = plan

  variables {
    llm_models = { fast = { base_url = "https://llm.example/v1", api_key_name = "WEBHOOK_SECRET" } }
  }

  expect_failures = [var.llm_models]
}

run "more_models_than_an_environment_holds_are_refused" {
  command = plan

  variables {
    llm_models = { for number in range(20) : "model-number-${number}" => {
      base_url = "https://llm.example.com/openai/compatible/v1", model = "a-model-with-quite-a-long-name-${number}", api_key_name = "FAST_KEY"
    } }
  }

  expect_failures = [var.llm_models]
}

run "the_bundle_is_pinned" {
  command = plan

  variables {
    model_digest = "latest"
  }

  expect_failures = [var.model_digest]
}

run "a_bundle_in_the_package_comes_with_the_package_that_has_one" {
  command = plan

  variables {
    model_uri = "package"
  }

  assert {
    condition     = module.function["inference"].package == "tests/packages/inference-with-model.zip" && module.function["submit"].package == "tests/packages/submit.zip"
    error_message = "Inference would start without its model, or the others with it."
  }
}

run "a_stage_that_nobody_could_call_is_refused" {
  command = plan

  variables {
    use_api_keys = false
  }

  expect_failures = [var.use_api_keys]
}

run "prod_admits_no_guests" {
  command = plan

  variables {
    stage        = "prod"
    admit_guests = true
  }

  expect_failures = [var.admit_guests]
}

run "reserving_less_than_the_queue_hands_out_is_refused" {
  command = plan

  variables {
    reserved_concurrency = { inference = 5 }
  }

  expect_failures = [var.reserved_concurrency]
}

run "as_many_instances_as_prompts_and_descriptions_take_are_enough" {
  command = plan

  variables {
    max_concurrent_prompts   = 30
    function_timeout_seconds = 900
    reserved_concurrency     = { enrichment = 40 }
  }

  assert {
    condition     = aws_cloudwatch_metric_alarm.this["iterator-age"].threshold > 1000 * min(local.environment.LEASE_SECONDS, local.functions["enrichment"].timeout_seconds)
    error_message = "One slow description would raise an alarm."
  }
}

run "fewer_instances_than_prompts_and_descriptions_take_are_refused" {
  command = plan

  variables {
    max_concurrent_prompts = 30
    reserved_concurrency   = { enrichment = 39 }
  }

  expect_failures = [var.reserved_concurrency]
}

run "photos_that_outlive_results_are_refused" {
  command = plan

  variables {
    photo_ttl_days = 31
  }

  expect_failures = [var.photo_ttl_days]
}

run "a_budget_that_tells_nobody_is_refused" {
  command = plan

  variables {
    monthly_budget_usd = 100
  }

  expect_failures = [var.monthly_budget_usd]
}

run "a_budget_counts_its_own_stage_and_mails" {
  command = plan

  variables {
    monthly_budget_usd = 100
    alarm_email        = "oncall@example.com"
  }

  assert {
    condition     = one(one(aws_budgets_budget.month[*].cost_filter)).values == tolist(["user:stage$dev"])
    error_message = "Another stage's costs would set it off."
  }

  assert {
    condition = (
      length(aws_sns_topic_subscription.alarms) == 1
      && alltrue([for it in aws_cloudwatch_metric_alarm.this : length(it.alarm_actions) == 1])
    )
    error_message = "An alarm would go off in silence."
  }
}

run "a_stage_has_no_page_unless_it_says_so" {
  command = plan

  assert {
    condition     = length(aws_cloudfront_distribution.page) + length(aws_s3_bucket.page) + length(aws_s3_object.page) == 0
    error_message = "A page was made that nobody asked for."
  }
}

run "the_page_is_served_with_its_own_headers_and_may_ask_its_own_stage_alone" {
  command = plan

  variables {
    page = true
  }

  assert {
    condition = alltrue([
      for part in ["default-src 'none'", "script-src 'self';", "connect-src 'self' wss://a.example;", "img-src 'self' https://b.s3.eu-central-1.amazonaws.com blob:;", "frame-ancestors 'none'"] :
      strcontains(aws_cloudfront_response_headers_policy.page[0].security_headers_config[0].content_security_policy[0].content_security_policy, part)
    ])
    error_message = "The page would not find its stage, or could ask others."
  }

  assert {
    condition = toset(aws_cloudfront_response_headers_policy.page[0].custom_headers_config[0].items[*].header) == setsubtract(
      keys(local.page_headers), ["content-security-policy", "referrer-policy", "x-content-type-options"]
    )
    error_message = "A header of web/headers.json is not sent."
  }

  assert {
    condition = (
      aws_s3_object.page["index.html"].content_type == "text/html; charset=utf-8"
      && aws_s3_object.page["app.js"].content_type == "text/javascript; charset=utf-8"
      && contains(keys(aws_s3_object.page), "config.json")
      && !contains(keys(aws_s3_object.page), "headers.json")
    )
    error_message = "A file of the page is missing, has no type, or is not for people."
  }

  assert {
    condition     = alltrue([for it in aws_cloudfront_distribution.page[0].ordered_cache_behavior : it.cache_policy_id == local.not_cached])
    error_message = "CloudFront would keep somebody's result."
  }
}
