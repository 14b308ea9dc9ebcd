locals {
  name = "lesion-${var.stage}"
}
