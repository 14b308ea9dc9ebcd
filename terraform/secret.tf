# JSON with LLM_API_KEY, the keys of llm_models, CACHE_KEY and WEBHOOK_SECRET. Made empty: scripts/deploy puts the
# values in, so that they are in nobody's state or plan.
resource "aws_secretsmanager_secret" "functions" {
  name                    = "${local.name}-functions"
  kms_key_id              = aws_kms_key.data.arn
  recovery_window_in_days = var.keep_data ? 30 : 0
}
