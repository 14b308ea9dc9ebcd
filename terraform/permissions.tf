# Of an agent's ARN, which is made elsewhere.
data "aws_caller_identity" "this" {
  count = var.bedrock_agent == null ? 0 : 1
}

data "aws_partition" "this" {
  count = var.bedrock_agent == null ? 0 : 1
}

# What each function may do: every action and every resource by name.
locals {
  jobs    = [aws_dynamodb_table.jobs.arn]
  callers = [aws_dynamodb_table.callers.arn]
  blobs   = aws_s3_bucket.blobs.arn

  # S3 answers 404 for a missing key only to those who may list, and knows no prefix while reading.
  may_list_blobs = { actions = ["s3:ListBucket"], resources = [local.blobs] }
  may_send       = { actions = ["sqs:SendMessage"], resources = [aws_sqs_queue.jobs.arn] }
  may_read_secret = {
    actions   = ["secretsmanager:GetSecretValue"]
    resources = [aws_secretsmanager_secret.functions.arn]
  }
  # A transaction needs the rights to each of its writes.
  may_write_jobs = {
    actions   = ["dynamodb:GetItem", "dynamodb:PutItem", "dynamodb:UpdateItem"]
    resources = local.jobs
  }

  # Deleting is using up: a ticket, or a connection with what it was subscribed to.
  may_close = { actions = ["dynamodb:DeleteItem", "dynamodb:GetItem"], resources = [aws_dynamodb_table.connections.arn] }

  may_push = [
    {
      actions   = ["execute-api:ManageConnections"]
      resources = ["${local.socket_arn}/${local.socket_stage}/POST/@connections/*"]
    },
  ]

  may_use_key = [
    { actions = ["kms:Decrypt", "kms:GenerateDataKey"], resources = [aws_kms_key.data.arn] },
  ]

  # Who reads keys writes none: counts of requests lie in the same table, under other names.
  of_callers = {
    for part in ["key", "requests", "account"] :
    part => { "ForAllValues:StringLike" = { "dynamodb:LeadingKeys" = ["${part}#*"] } }
  }
  may_check_callers = [
    { actions = ["dynamodb:GetItem"], resources = local.callers, condition = local.of_callers.key },
    { actions = ["dynamodb:UpdateItem"], resources = local.callers, condition = local.of_callers.requests },
  ]

  may_submit = [
    local.may_write_jobs,
    local.may_send,
    local.may_list_blobs,
    { actions = ["s3:PutObject"], resources = ["${local.blobs}/jobs/*", "${local.blobs}/incoming/*"] },
    { actions = ["s3:GetObject", "s3:DeleteObject"], resources = ["${local.blobs}/incoming/*"] },
    # Of what was stored for a job that was then not made.
    { actions = ["s3:DeleteObject"], resources = ["${local.blobs}/jobs/*/photo", "${local.blobs}/jobs/*/prompt.json"] },
  ]

  may_answer = [
    local.may_write_jobs,
    local.may_send,
    # The idempotency item of a deleted job.
    { actions = ["dynamodb:DeleteItem"], resources = local.jobs },
    { actions = ["dynamodb:Query"], resources = ["${aws_dynamodb_table.jobs.arn}/index/callers"] },
    local.may_list_blobs,
    { actions = ["s3:DeleteObject"], resources = ["${local.blobs}/jobs/*"] },
    # The LLM's answers that are too large for a record, and maps, which the links that it signs give;
    # no photo.
    { actions = ["s3:GetObject"], resources = ["${local.blobs}/jobs/*/answer-*", "${local.blobs}/jobs/*/map-*"] },
  ]

  may_administer = [
    local.may_write_jobs,
    local.may_send,
    {
      actions   = ["dynamodb:GetItem", "dynamodb:PutItem", "dynamodb:UpdateItem"]
      resources = local.callers
    },
    { actions = ["dynamodb:Query"], resources = ["${aws_dynamodb_table.callers.arn}/index/keys"] },
    {
      actions = [
        "sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:ChangeMessageVisibility", "sqs:GetQueueAttributes",
      ]
      resources = [aws_sqs_queue.dead_letters.arn, aws_sqs_queue.webhook_dead_letters.arn]
    },
    local.may_send_webhooks,
  ]

  may_infer = [
    local.may_write_jobs,
    local.may_list_blobs,
    { actions = ["s3:GetObject"], resources = ["${local.blobs}/jobs/*", "${local.blobs}/models/*"] },
    { actions = ["s3:PutObject"], resources = ["${local.blobs}/jobs/*/map-*"] },
    {
      actions = [
        "sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:ChangeMessageVisibility", "sqs:GetQueueAttributes",
      ]
      resources = [aws_sqs_queue.jobs.arn]
    },
  ]

  # The secret holds what makes the cache's keys.
  may_read_cache_key = var.cache == "none" ? [] : [local.may_read_secret]

  may_cache = var.cache != "s3" ? [] : [
    {
      actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"]
      resources = ["${local.blobs}/cache/*"]
    },
  ]

  # The network interfaces belong to the service, and have no names when they are asked for:
  # https://docs.aws.amazon.com/lambda/latest/dg/configuration-vpc.html#configuration-vpc-permissions
  may_join_network = var.cache != "redis" ? [] : [
    {
      actions = [
        "ec2:CreateNetworkInterface", "ec2:DescribeNetworkInterfaces", "ec2:DescribeSubnets",
        "ec2:DeleteNetworkInterface", "ec2:AssignPrivateIpAddresses", "ec2:UnassignPrivateIpAddresses",
      ]
      resources = ["*"]
    },
  ]

  may_enrich = [
    local.may_write_jobs,
    local.may_read_secret,
    local.may_list_blobs,
    { actions = ["s3:GetObject"], resources = ["${local.blobs}/jobs/*/prompt.json"] },
    { actions = ["s3:PutObject"], resources = ["${local.blobs}/jobs/*/answer-*"] },
    {
      actions   = ["dynamodb:DescribeStream", "dynamodb:GetRecords", "dynamodb:GetShardIterator"]
      resources = [aws_dynamodb_table.jobs.stream_arn]
    },
    # Takes no name of a stream.
    { actions = ["dynamodb:ListStreams"], resources = ["${aws_dynamodb_table.jobs.arn}/stream/*"] },
    { actions = ["sqs:SendMessage"], resources = [aws_sqs_queue.enrichment_failures.arn, aws_sqs_queue.prompts.arn] },
    {
      actions   = ["sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:GetQueueAttributes"]
      resources = [aws_sqs_queue.prompts.arn]
    },
  ]

  may_connect = [
    local.may_write_jobs,
    local.may_list_blobs,
    local.may_close,
    {
      actions   = ["dynamodb:PutItem", "dynamodb:UpdateItem"]
      resources = [aws_dynamodb_table.connections.arn]
    },
    { actions = ["s3:PutObject"], resources = ["${local.blobs}/jobs/*/prompt.json"] },
    # Of a prompt that was stored twice.
    { actions = ["s3:DeleteObject"], resources = ["${local.blobs}/jobs/*/prompt.json"] },
  ]

  may_notify = [
    { actions = ["dynamodb:GetItem"], resources = local.jobs },
    local.may_send_webhooks,
    local.may_close,
    { actions = ["dynamodb:Query"], resources = [aws_dynamodb_table.connections.arn] },
    {
      actions   = ["dynamodb:DescribeStream", "dynamodb:GetRecords", "dynamodb:GetShardIterator"]
      resources = [aws_dynamodb_table.jobs.stream_arn]
    },
    # Takes no name of a stream.
    { actions = ["dynamodb:ListStreams"], resources = ["${aws_dynamodb_table.jobs.arn}/stream/*"] },
  ]

  # Nothing of a caller, a photo or a prompt.
  may_deliver = [
    { actions = ["dynamodb:GetItem", "dynamodb:PutItem"], resources = local.jobs },
    local.may_read_secret,
    {
      actions = [
        "sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:ChangeMessageVisibility", "sqs:GetQueueAttributes",
      ]
      resources = [aws_sqs_queue.webhooks.arn]
    },
    local.may_bury_webhooks,
  ]

  may_chat = [
    local.may_read_secret,
    # What keys have used of their tokens and dollars.
    { actions = ["dynamodb:GetItem", "dynamodb:PutItem"], resources = local.callers, condition = local.of_callers.account },
  ]

  # One alias of one agent; what the agent itself may do is its own role's affair.
  may_invoke_agent = [for agent in var.bedrock_agent[*] : {
    actions = ["bedrock:InvokeAgent"]
    resources = [
      "arn:${one(data.aws_partition.this[*].partition)}:bedrock:${var.region}:${one(data.aws_caller_identity.this[*].account_id)}:agent-alias/${agent.agent_id}/${agent.alias_id}",
    ]
  }]

  may_sweep = [
    local.may_write_jobs,
    local.may_send,
    local.may_bury_webhooks,
    { actions = ["dynamodb:Query"], resources = ["${aws_dynamodb_table.jobs.arn}/index/due"] },
    { actions = ["s3:DeleteObject"], resources = ["${local.blobs}/jobs/*", "${local.blobs}/incoming/*"] },
    {
      actions   = ["s3:ListBucket"]
      resources = [local.blobs]
      condition = { StringLike = { "s3:prefix" = ["jobs/*", "incoming/*"] } }
    },
  ]
}
