# Set who may call before the first plan, which is refused without: jwt_issuer and jwt_audience, or
# use_api_keys = true. alarm_email and monthly_budget_usd say who hears of trouble, and of its price.
stage                     = "prod"
cache                     = "s3"
max_concurrent_inferences = 50
max_concurrent_prompts    = 20
log_retention_days        = 90

# chat's address is public and nothing throttles it: as many answers at a time, and no more instances. Callers who
# wait for results (?wait=) hold an instance each, and leave photos and sweep theirs. The account needs 100 instances
# besides (RUNBOOK.md, The address of chat).
reserved_concurrency = { chat = 50, inference = 50, result = 200, sweep = 2 }
