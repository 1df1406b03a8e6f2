# dnsd on every client that may run it (a system job): names are answered on each host's loopback, which is also where
# relays ask. One of all is elected and keeps the leases.
#
#   nomad job run nomad/dnsd.nomad.hcl

variable "driver" {
  type        = string
  default     = "raw_exec"
  description = "raw_exec, exec or docker"
}

variable "image" {
  type        = string
  default     = "ztna-mesh:0.1.0"
  description = "With docker: the image"
}

variable "command" {
  type        = string
  default     = "ztna-dnsd"
  description = "The console script: on PATH, or its full path"
}

variable "datacenters" {
  type        = list(string)
  default     = ["*"]
  description = "The datacenters it runs in"
}

variable "node_class" {
  type        = string
  default     = ""
  description = "The class of the clients it runs on; empty: all"
}

variable "address" {
  type        = string
  default     = "127.0.0.1"
  description = "The address it answers at; who asks from elsewhere must be in dnsd.allow (docs/secondaries.md)"
}

variable "port" {
  type        = number
  default     = 5533
  description = "The static port it answers at, UDP and TCP; 53 needs root or CAP_NET_BIND_SERVICE"
}

variable "pool" {
  type        = string
  default     = "10.100.0.0/16"
  description = "The network that virtual addresses are leased from, the same for all"
}

variable "grace_s" {
  type        = number
  default     = 300
  description = "How long a service without instances keeps its lease, in seconds"
}

variable "consul" {
  type        = string
  default     = "http://127.0.0.1:8500"
  description = "The HTTP address of the Consul agent on the same host"
}

variable "login_method" {
  type        = string
  default     = ""
  description = "Consul's auth method for Nomad's workload identities (docs/nomad.md); empty: no token"
}

variable "domain" {
  type        = string
  default     = "ztna.local"
  description = "The zone of the services' names"
}

job "dnsd" {
  type        = "system"
  datacenters = var.datacenters

  dynamic "constraint" {
    for_each = var.node_class == "" ? [] : [var.node_class]

    content {
      attribute = "$${node.class}"
      value     = constraint.value
    }
  }

  # One host after the other; each waits until the one before answers again.
  update {
    max_parallel     = 1
    health_check     = "checks"
    min_healthy_time = "5s"
  }

  group "dnsd" {
    # The last names, for a start while Consul is away: an update on the same host takes them along.
    ephemeral_disk {
      sticky = true
      size   = 150
    }

    network {
      port "dns" {
        static = var.port
      }

      port "admin" {}
    }

    service {
      name     = "ztna-dnsd"
      provider = "consul"
      port     = "admin"
      address  = "127.0.0.1"

      check {
        name     = "ready"
        type     = "http"
        path     = "/readyz"
        interval = "5s"
        timeout  = "2s"
      }
    }

    task "dnsd" {
      driver       = var.driver
      kill_timeout = "10s"
      kill_signal  = "SIGTERM"

      # Where the image's health check asks; others have no use for it.
      env {
        READY_AT = "127.0.0.1:${NOMAD_PORT_admin}"
      }

      dynamic "config" {
        for_each = var.driver == "docker" ? [] : [var.command]

        content {
          command = config.value
          args    = ["--config", "${NOMAD_TASK_DIR}/dnsd.yaml"]
        }
      }

      dynamic "config" {
        for_each = var.driver == "docker" ? [var.command] : []

        content {
          image        = var.image
          command      = config.value
          args         = ["--config", "${NOMAD_TASK_DIR}/dnsd.yaml"]
          network_mode = "host"

          # No capability, and nothing of the image can be written to.
          cap_drop        = ["all"]
          security_opt    = ["no-new-privileges"]
          readonly_rootfs = true

          mount {
            type   = "tmpfs"
            target = "/run"
          }

          mount {
            type   = "tmpfs"
            target = "/tmp"
          }
        }
      }

      # What it logs in to Consul with, when login_method is set.
      identity {
        name = "consul"
        aud  = ["consul.io"]
        ttl  = "1h"
        file = true
      }

      template {
        destination = "local/dnsd.yaml"
        data        = <<-YAML
          domain: ${var.domain}
          consul:
            address: ${var.consul}
            %{~if var.login_method != ""~}

            login:
              method: ${var.login_method}
              jwt_file: {{ env "NOMAD_SECRETS_DIR" }}/nomad_consul.jwt
            %{~endif~}

          dnsd:
            listen: ${var.address}:{{ env "NOMAD_PORT_dns" }}
            admin: 127.0.0.1:{{ env "NOMAD_PORT_admin" }}
            snapshot: {{ env "NOMAD_ALLOC_DIR" }}/data/dnsd.names
            pool:
              cidr: ${var.pool}
            grace_s: ${var.grace_s}
        YAML
      }

      resources {
        cpu    = 100
        memory = 128
      }
    }
  }
}
