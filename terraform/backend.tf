# One state per stage: scripts/deploy gives bucket and key. The emulator's stage leaves this file out
# and keeps its state beside it.
terraform {
  backend "s3" {}
}
