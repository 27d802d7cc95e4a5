terraform {
  required_version = ">= 1.3"
}

variable "program_url" {
  description = "URL of a tar.gz with controller, agent, timonel-controller.service and timonel-agent.service."
  type        = string
}

variable "controllers" {
  description = "Address of each master by its name: 1, 3 or 5 of them."
  type        = map(string)
  validation {
    condition     = contains([1, 3, 5], length(var.controllers))
    error_message = "A cluster has 1, 3 or 5 controllers."
  }
}

variable "join_token" {
  description = "The token that agents join with, as `timonel token create` prints it."
  type        = string
  sensitive   = true
}

variable "bundle_tgz" {
  description = "The folder that `timonel init` made, as tar.gz in base64."
  type        = string
  sensitive   = true
}

locals {
  gossip  = join(",", [for ip in values(var.controllers) : "${ip}:7946"])
  cluster = join(",", [for ip in values(var.controllers) : "${ip}:7443"])
  fetch   = "curl -fsSL '${var.program_url}' | tar -xz -C /opt/timonel"
}

output "controller_user_data" {
  description = "cloud-init document of each master, by its name."
  sensitive   = true
  value = { for name, ip in var.controllers : name => join("\n", ["#cloud-config", yamlencode({
    write_files = [
      { path = "/etc/timonel/bundle.tgz", permissions = "0600", encoding = "b64", content = var.bundle_tgz },
      { path = "/etc/timonel/controller.env", permissions = "0600", content = join(" ", [
        "CONTROLLER_FLAGS=--name=${name}", "--bind-ip=${ip}", "--bootstrap-expect=${length(var.controllers)}", "--join=${local.gossip}",
      ]) },
    ]
    runcmd = [
      "mkdir -p /opt/timonel /etc/timonel/bundle && ${local.fetch}",
      "tar -xzf /etc/timonel/bundle.tgz -C /etc/timonel/bundle --strip-components=1 && rm /etc/timonel/bundle.tgz",
      "install -m 0755 /opt/timonel/controller /usr/local/bin/timonel-controller",
      "install -m 0644 /opt/timonel/timonel-controller.service /etc/systemd/system/",
      "systemctl daemon-reload && systemctl enable --now timonel-controller",
    ]
  })]) }
}

output "agent_user_data" {
  description = "cloud-init document of every worker; a worker is named after its host name."
  sensitive   = true
  value = join("\n", ["#cloud-config", yamlencode({
    packages = ["containerd", "runc", "nftables", "containernetworking-plugins"]
    write_files = [
      { path = "/etc/timonel/token", permissions = "0600", content = var.join_token },
      { path = "/etc/timonel/agent.env", permissions = "0600", content = "AGENT_FLAGS=--controllers=${local.cluster}" },
    ]
    runcmd = [
      "mkdir -p /opt/timonel && ${local.fetch}",
      "install -m 0755 /opt/timonel/agent /usr/local/bin/timonel-agent",
      "install -m 0644 /opt/timonel/timonel-agent.service /etc/systemd/system/",
      "systemctl daemon-reload && systemctl enable --now timonel-agent",
    ]
  })])
}
