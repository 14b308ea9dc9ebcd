# Plans whose policies scripts/check-plan reads: with each cache, since rights depend on it.

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

run "without_cache" {
  command = plan

  variables {
    cache = "none"
  }

  assert {
    condition     = !can(regex("cache/|ec2:", module.function["inference"].policy))
    error_message = "Inference may do what it has no use for."
  }
}

run "with_the_cache_in_s3" {
  command = plan

  variables {
    cache = "s3"
  }

  assert {
    condition     = [for key, it in module.function : key if can(regex("/cache/", it.policy))] == ["inference"]
    error_message = "The cache is inference's alone."
  }
}

run "with_the_cache_in_redis" {
  command = plan

  variables {
    cache = "redis"
  }

  assert {
    condition     = [for key, it in module.function : key if can(regex("ec2:", it.policy))] == ["inference"]
    error_message = "Only inference joins the network."
  }
}

run "each_function_writes_to_its_own_log_alone_and_reads_what_it_needs" {
  command = plan

  assert {
    condition     = [for key, it in module.function : key if can(regex("GetSecretValue", it.policy))] == ["chat", "enrichment", "inference"]
    error_message = "Those that need no secret cannot read it."
  }

  assert {
    condition     = [for key, it in module.function : key if can(regex("s3:GetObject[^}]*/(jobs|incoming)/[*]\"", it.policy))] == ["inference", "submit"]
    error_message = "Photos are read by those two alone."
  }

  assert {
    condition     = !can(regex("s3:|sqs:", module.function["chat"].policy))
    error_message = "Conversations have nothing to do with photos or jobs."
  }

  assert {
    condition     = [for key, it in module.function : key if can(regex("s3:GetObject[^}]*/jobs/[*]/(prompt.json|answer-[*])\"", it.policy))] == ["enrichment", "result"]
    error_message = "Prompts are read by enrichment alone, large answers by result."
  }

  assert {
    condition     = [for key, it in module.function : key if can(regex("dynamodb:DeleteItem", it.policy))] == ["result"]
    error_message = "Only a delete deletes."
  }
}
