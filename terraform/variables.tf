variable "stage" {
  description = "Name of the stage; part of every resource's name."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9]{1,9}$", var.stage))
    error_message = "A stage is 2 to 10 lower-case letters and digits, beginning with a letter."
  }
}

variable "region" {
  description = "AWS region of the stage."
  type        = string
  default     = "eu-central-1"
}

variable "emulator_url" {
  description = "Where an AWS emulator listens; null for AWS itself."
  type        = string
  default     = null
}

variable "keep_data" {
  description = "Whether destroying the stage is refused while it holds data."
  type        = bool
  default     = true
}

# Packages and model.

variable "packages_dir" {
  description = "Folder of the zips that scripts/package makes, one a function."
  type        = string
  default     = "../target/lambda"
}

variable "architecture" {
  description = "Processor that the packages were built for. arm64 is untested: ONNX Runtime has crashed on it in Lambda."
  type        = string
  default     = "x86_64"

  validation {
    condition     = contains(["x86_64", "arm64"], var.architecture)
    error_message = "The architecture is x86_64 or arm64."
  }
}

variable "model_digest" {
  description = "SHA-256 of the model bundle's manifest (MODEL_DIGEST)."
  type        = string

  validation {
    condition     = can(regex("^[0-9a-f]{64}$", var.model_digest))
    error_message = "The digest is 64 lower-case hex digits."
  }
}

variable "model_uri" {
  description = "Where inference finds the bundle: s3 (models/<digest>/ in the stage's bucket) or package (MODEL_URI)."
  type        = string
  default     = "s3"

  validation {
    condition     = contains(["s3", "package"], var.model_uri)
    error_message = "The bundle comes from s3 or package."
  }
}

# The rules of jobs, the same in every function.

variable "max_attempts" {
  description = "Claims per stage of the pipeline before a job is given up (MAX_ATTEMPTS)."
  type        = number
  default     = 5
}

variable "redispatch_seconds" {
  description = "After which an unclaimed job is sent again, doubling (REDISPATCH_SECONDS)."
  type        = number
  default     = 120
}

variable "backoff_seconds" {
  description = "First wait after a failure, doubling (BACKOFF_SECONDS)."
  type        = number
  default     = 5
}

variable "deadline_hours" {
  description = "How long a job may stay open (DEADLINE_HOURS)."
  type        = number
  default     = 24
}

variable "photo_ttl_days" {
  description = "When photos, maps, prompts and large answers are deleted (PHOTO_TTL_DAYS)."
  type        = number
  default     = 7

  validation {
    condition     = var.photo_ttl_days <= var.result_ttl_days
    error_message = "Photos go sooner than results."
  }

  validation {
    condition     = var.photo_ttl_days * 24 >= var.deadline_hours
    error_message = "An open job needs its photo: photo_ttl_days must cover deadline_hours."
  }
}

variable "result_ttl_days" {
  description = "When results are deleted (RESULT_TTL_DAYS)."
  type        = number
  default     = 30
}

variable "max_queued_mb" {
  description = "Photos and prompts that one caller may have waiting (MAX_QUEUED_MB)."
  type        = number
  default     = 4096
}

# Who may call, and how often.

variable "use_api_keys" {
  description = "That callers come with API keys, so that a stage without an issuer is meant; keys are taken in any case."
  type        = bool
  default     = false

  validation {
    condition     = var.use_api_keys || var.jwt_issuer != null || var.admit_guests
    error_message = "Nobody could call this stage: set jwt_issuer and jwt_audience, or use_api_keys = true."
  }
}

variable "admit_guests" {
  description = "Whether requests without credentials are the caller guest (ADMIT_GUESTS)."
  type        = bool
  default     = false

  validation {
    condition     = !(var.admit_guests && var.stage == "prod")
    error_message = "prod admits no guests."
  }
}

variable "jwt_issuer" {
  description = "OpenID Connect issuer whose tokens are taken; null takes keys only (JWT_ISSUER)."
  type        = string
  default     = null

  validation {
    condition     = var.jwt_issuer == null || can(regex("^https://", var.jwt_issuer))
    error_message = "The issuer's address begins with https://."
  }
}

variable "jwt_audience" {
  description = "The aud or client_id of the tokens (JWT_AUDIENCE)."
  type        = string
  default     = null

  validation {
    condition     = (var.jwt_issuer == null) == (var.jwt_audience == null)
    error_message = "Issuer and audience are set together."
  }
}

variable "requests_per_minute" {
  description = "For each caller (REQUESTS_PER_MINUTE)."
  type        = number
  default     = 600
}

variable "guest_requests_per_minute" {
  description = "For all guests together (GUEST_REQUESTS_PER_MINUTE)."
  type        = number
  default     = 60
}

variable "throttle" {
  description = "What the API takes from all callers together."
  type        = object({ requests_per_second = number, burst = number })
  default     = { requests_per_second = 100, burst = 200 }
}

variable "allowed_origins" {
  description = "Web pages that may call the API, such as https://clinic.example; none by default."
  type        = list(string)
  default     = []
}

variable "page" {
  description = "Whether the stage has the page for people, behind CloudFront."
  type        = bool
  default     = false
}

variable "web_dir" {
  description = "Folder of the page's files."
  type        = string
  default     = "../web"
}

variable "webhook_hosts" {
  description = "Hosts that a callback_url may name, such as hooks.clinic.example or hooks.clinic.example:8443; none by default (WEBHOOK_HOSTS)."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for host in var.webhook_hosts : can(regex("^[^,/@?# ]+$", host))])
    error_message = "A host is a name or an address, with a port or without; no scheme and no path."
  }
}

# Size.

variable "function_timeout_seconds" {
  description = "How long one invocation of inference may take, which is also its lease."
  type        = number
  default     = 60

  validation {
    condition     = var.function_timeout_seconds <= 900
    error_message = "Lambda ends an invocation after 900 seconds."
  }
}

variable "enrichment_timeout_seconds" {
  description = "How long one claim on a description may last."
  type        = number
  default     = 120

  validation {
    condition     = var.enrichment_timeout_seconds > var.llm_timeout_seconds && var.enrichment_timeout_seconds <= 900
    error_message = "A description needs time for at least one try of the LLM, and Lambda ends after 900 seconds."
  }
}

variable "prompt_timeout_seconds" {
  description = "How long one attempt at a prompt may take, the LLM's answer included, which is also its lease."
  type        = number
  default     = 600

  validation {
    condition     = var.prompt_timeout_seconds >= var.enrichment_timeout_seconds && var.prompt_timeout_seconds <= 900
    error_message = "A prompt gets no less time than a description, and Lambda ends after 900 seconds."
  }
}

variable "max_concurrent_inferences" {
  description = "Photos at work at a time."
  type        = number
  default     = 10

  validation {
    condition     = var.max_concurrent_inferences >= 2 && var.max_concurrent_inferences <= 1000
    error_message = "SQS takes 2 to 1000."
  }
}

variable "max_concurrent_prompts" {
  description = "Prompts being answered at a time, each by an instance of enrichment, for minutes."
  type        = number
  # A new account may have 10 instances in all.
  default = 4

  validation {
    condition     = var.max_concurrent_prompts >= 2 && var.max_concurrent_prompts <= 1000
    error_message = "SQS takes 2 to 1000."
  }
}

variable "reserved_concurrency" {
  description = "Instances reserved for functions, by their name; the account must have 100 more than all of these."
  type        = map(number)
  default     = {}

  validation {
    condition     = lookup(var.reserved_concurrency, "inference", var.max_concurrent_inferences) >= var.max_concurrent_inferences
    error_message = "The queue hands out more than inference may take: reserve at least max_concurrent_inferences."
  }

  validation {
    condition     = lookup(var.reserved_concurrency, "enrichment", var.max_concurrent_prompts + 10) >= var.max_concurrent_prompts + 10
    error_message = "Prompts could take all instances of enrichment: reserve at least 10 more than max_concurrent_prompts."
  }
}

variable "cache" {
  description = "Where the model's raw outputs are cached: none, s3, or redis, which puts inference into a VPC."
  type        = string
  default     = "none"

  validation {
    condition     = contains(["none", "s3", "redis"], var.cache)
    error_message = "The cache is none, s3 or redis."
  }
}

# The LLM.

variable "llm_base_url" {
  description = "An OpenAI-compatible server; without it and without bedrock_agent the template describes (LLM_BASE_URL)."
  type        = string
  default     = null
}

variable "bedrock_agent" {
  description = "An agent of Amazon Bedrock in the stage's region and account, instead of a server: its id, its alias's, and whether it has a memory (BEDROCK_AGENT_ID, BEDROCK_AGENT_ALIAS_ID, BEDROCK_AGENT_MEMORY)."
  type        = object({ agent_id = string, alias_id = string, has_memory = optional(bool, false) })
  default     = null

  validation {
    condition     = var.bedrock_agent == null || var.llm_base_url == null
    error_message = "bedrock_agent and llm_base_url are two LLMs: set one."
  }
}

variable "llm_model" {
  description = "The model to ask for (LLM_MODEL)."
  type        = string
  default     = null

  validation {
    condition     = (var.llm_base_url == null) == (var.llm_model == null)
    error_message = "The LLM's address and its model are set together."
  }
}

variable "llm_max_tokens" {
  description = "Of one answer (LLM_MAX_TOKENS)."
  type        = number
  default     = 500
}

variable "llm_temperature" {
  description = "0 to 2 (LLM_TEMPERATURE)."
  type        = number
  default     = 0.7
}

variable "llm_timeout_seconds" {
  description = "For one try (LLM_TIMEOUT_SECONDS)."
  type        = number
  default     = 30
}

variable "llm_prompt_usd_per_million" {
  description = "What a million tokens of prompts cost; null counts no money (LLM_PROMPT_USD_PER_MILLION)."
  type        = number
  default     = null

  validation {
    condition     = (var.llm_prompt_usd_per_million == null) == (var.llm_completion_usd_per_million == null)
    error_message = "Prices of prompts and of completions are set together."
  }
}

variable "llm_completion_usd_per_million" {
  description = "The same of completions (LLM_COMPLETION_USD_PER_MILLION)."
  type        = number
  default     = null
}

variable "llm_models" {
  description = "The models of /v1/ by their names, in place of the one above, with the fields of docs/API.md; keys lie in the stage's secret under api_key_name (LLM_MODELS)."
  # No map of objects: that would drop a field which it does not know.
  type    = any
  default = {}

  validation {
    condition = alltrue([for alias, it in var.llm_models : alias != "" && length(setsubtract(keys(it), [
      "base_url", "model", "api_key_name", "prompt_usd_per_million", "completion_usd_per_million", "fallback",
      "timeout_seconds", "max_completion_tokens",
    ])) == 0])
    error_message = "A model has a name, and no other fields than those in docs/API.md; its key is none of them."
  }

  validation {
    condition     = alltrue([for it in var.llm_models : can(regex("^https?://.", it.base_url))])
    error_message = "Each model has a base_url, such as https://api.openai.com/v1."
  }

  validation {
    condition = alltrue([
      for alias, it in var.llm_models : contains(setsubtract(concat(keys(var.llm_models), [""]), [alias]), try(coalesce(it.fallback), ""))
    ])
    error_message = "A fallback is another of the models."
  }

  validation {
    condition = alltrue([
      for it in var.llm_models : (try(it.prompt_usd_per_million, null) == null) == (try(it.completion_usd_per_million, null) == null)
    ])
    error_message = "Prices of prompts and of completions are set together."
  }

  # Another name would send a server what the stage signs with.
  validation {
    condition = alltrue([
      for it in var.llm_models : can(regex("^[A-Z][A-Z0-9_]*$", it.api_key_name)) && !contains(["CACHE_KEY", "WEBHOOK_SECRET"], it.api_key_name)
      if try(it.api_key_name, null) != null
    ])
    error_message = "api_key_name is the name of a key in the stage's secret, such as OPENAI_API_KEY, and not one of the stage's own."
  }

  # Lambda takes 4 KB of environment in all, and the rest is the other settings'.
  validation {
    condition     = length(jsonencode(var.llm_models)) <= 2560
    error_message = "A function's environment has room for 2.5 KB of models as JSON: leave out what is a default, or shorten names."
  }
}

# Watching.

variable "log_level" {
  description = "error, warn, info, debug, or tracing directives (LOG_LEVEL)."
  type        = string
  default     = "info"
}

variable "log_retention_days" {
  description = "When log lines are deleted."
  type        = number
  default     = 30
}

variable "alarm_email" {
  description = "Who hears of alarms and of the budget; null tells nobody."
  type        = string
  default     = null
}

variable "monthly_budget_usd" {
  description = "Of which 80 % spent, or all of it forecast, is mailed to alarm_email; null sets none."
  type        = number
  default     = null

  validation {
    condition     = var.monthly_budget_usd == null || var.alarm_email != null
    error_message = "A budget without alarm_email tells nobody."
  }
}
