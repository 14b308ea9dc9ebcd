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
    condition     = !can(regex("cache/|ec2:|secretsmanager", module.function["inference"].policy))
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

  assert {
    condition     = can(regex("GetSecretValue", module.function["inference"].policy))
    error_message = "Inference cannot read the key of the cache."
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

run "an_agent_is_invoked_by_those_who_ask_and_through_its_alias_alone" {
  command = plan

  variables {
    bedrock_agent = { agent_id = "AGENT12345", alias_id = "TSTALIASID" }
  }

  assert {
    condition = alltrue([
      for key, it in module.function :
      regexall("\"bedrock:[^\"]*\"", it.policy) == (contains(["chat", "enrichment"], key) ? ["\"bedrock:InvokeAgent\""] : [])
    ])
    error_message = "Others have nothing to ask an agent, and nobody has anything else to ask of Bedrock."
  }

  assert {
    condition = alltrue([
      for key in ["chat", "enrichment"] :
      can(regex("\\[\"bedrock:InvokeAgent\"\\],\"Effect\":\"Allow\",\"Resource\":\\[\"arn:aws:bedrock:eu-central-1:111122223333:agent-alias/AGENT12345/TSTALIASID\"\\]", module.function[key].policy))
    ])
    error_message = "Another agent, or another alias, could be invoked."
  }

  assert {
    condition     = local.functions["submit"].environment.BEDROCK_AGENT_ID == "AGENT12345" && local.functions["enrichment"].timeout_seconds >= 300
    error_message = "Submit would refuse prompts, or their answers be cut off."
  }

  assert {
    condition     = local.functions["inference"].environment.BEDROCK_AGENT_ID == "AGENT12345"
    error_message = "The template would describe what the agent is to."
  }
}

run "keys_are_written_by_admin_alone" {
  command = plan

  override_resource {
    target          = aws_dynamodb_table.callers
    override_during = plan
    values          = { arn = "arn:aws:dynamodb:eu-central-1:111122223333:table/callers" }
  }

  assert {
    condition = alltrue(flatten([
      for key, it in module.function : [
        for statement in jsondecode(it.policy).Statement :
        anytrue([
          for actions, part in { GetItem = "key", UpdateItem = "requests", "GetItem,PutItem" = "account" } :
          try(statement.Condition["ForAllValues:StringLike"]["dynamodb:LeadingKeys"], null) == ["${part}#*"]
          && join(",", [for action in statement.Action : trimprefix(action, "dynamodb:")]) == actions
        ])
        if key != "admin" && contains(flatten([statement.Resource]), "arn:aws:dynamodb:eu-central-1:111122223333:table/callers")
      ]
    ]))
    error_message = "Who checks keys reads them, counts requests and writes accounts."
  }

  assert {
    condition = [
      for key, it in module.function : key
      if can(regex("table/callers\"", it.policy))
    ] == ["admin", "chat", "result", "socket", "submit"]
    error_message = "Those that need no keys cannot read them."
  }
}

run "each_function_writes_to_its_own_log_alone_and_reads_what_it_needs" {
  command = plan

  assert {
    condition     = [for key, it in module.function : key if can(regex("GetSecretValue", it.policy))] == ["chat", "enrichment", "webhook"]
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
    condition     = [for key, it in module.function : key if can(regex("dynamodb:DeleteItem", it.policy))] == ["notify", "result", "socket"]
    error_message = "Only a delete deletes, and what ends a connection."
  }

  assert {
    condition     = [for key, it in module.function : key if can(regex("execute-api:ManageConnections", it.policy))] == ["enrichment", "notify", "socket"]
    error_message = "Others have nothing to tell."
  }

  assert {
    condition     = !can(regex("PutItem|UpdateItem|s3:|\"sqs:[^S]", module.function["notify"].policy))
    error_message = "Who tells of jobs writes none."
  }

  assert {
    condition     = !can(regex("UpdateItem|DeleteItem|Query|s3:|execute-api", module.function["webhook"].policy))
    error_message = "Who calls others back reads and writes records, and no more."
  }

  assert {
    condition     = length(regexall("SendMessage", module.function["webhook"].policy)) == 1 && local.may_bury_webhooks.resources == [aws_sqs_queue.webhook_dead_letters.arn]
    error_message = "It sends dead letters, and nothing else."
  }
}

run "the_page_is_read_by_its_distribution_alone" {
  command = plan

  variables {
    page = true
  }

  assert {
    condition = alltrue([
      for statement in jsondecode(aws_s3_bucket_policy.page[0].policy).Statement :
      statement.Principal == { Service = "cloudfront.amazonaws.com" }
      && statement.Condition.StringEquals["AWS:SourceArn"] == aws_cloudfront_distribution.page[0].arn
    ])
    error_message = "Somebody besides the page's distribution could read its bucket."
  }

  assert {
    condition     = aws_s3_bucket_public_access_block.page[0].restrict_public_buckets && aws_s3_bucket_public_access_block.page[0].block_public_policy
    error_message = "The page's bucket could be opened to everyone."
  }
}
