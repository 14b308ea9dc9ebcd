# On the AWS emulator of the tests; scripts/emulator gives its address.
stage        = "local"
region       = "us-east-1"
keep_data    = false
use_api_keys = true

# Tests wait for these.
backoff_seconds            = 1
redispatch_seconds         = 5
function_timeout_seconds   = 20
enrichment_timeout_seconds = 20
prompt_timeout_seconds     = 300
llm_timeout_seconds        = 5

# Made up.
llm_prompt_usd_per_million     = 1
llm_completion_usd_per_million = 4
