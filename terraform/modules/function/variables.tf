variable "name" {
  description = "Name of the function, its role and its log group."
  type        = string
}

variable "package" {
  description = "Path of the zip with the executable `bootstrap`."
  type        = string
}

variable "architecture" {
  description = "Processor that the package was built for: x86_64 or arm64."
  type        = string
}

variable "memory_mb" {
  description = "Memory of one instance; the processor's share grows with it."
  type        = number
}

variable "timeout_seconds" {
  description = "How long one invocation may take."
  type        = number
}

variable "environment" {
  description = "Environment variables; those that are null are left out."
  type        = map(string)
}

variable "permissions" {
  description = "What the function may do beside writing its own log."
  type = list(object({
    actions   = list(string)
    resources = list(string)
    condition = optional(map(map(list(string))))
  }))
}

variable "log_retention_days" {
  description = "When log lines are deleted."
  type        = number
}

variable "reserved_concurrency" {
  description = "Instances kept for this function, and the most it may have; null takes part in the account's."
  type        = number
  default     = null
}

variable "network" {
  description = "Subnets and security groups to join; null stays outside of any VPC."
  type        = object({ subnet_ids = list(string), security_group_ids = list(string) })
  default     = null
}
