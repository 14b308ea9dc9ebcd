# To try things out: open to guests within tight limits, and cheap.
stage              = "dev"
keep_data          = false
use_api_keys       = true
admit_guests       = true
page               = true
photo_ttl_days     = 1
result_ttl_days    = 7
log_level          = "debug"
log_retention_days = 7
cache              = "s3"
throttle           = { requests_per_second = 20, burst = 40 }

# chat's address is public and nothing throttles it. A new account may have 10 instances in all, of which none can be
# reserved; where yours has more than 100:
# reserved_concurrency = { chat = 10 }
