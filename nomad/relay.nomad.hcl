# The relay: static ports that agents and connectors of everywhere know, and a dnsd on the same host that it asks
# (dnsd.nomad.hcl). Its certificate lies in a Nomad variable that only this job may read:
#
#   ztna ca issue relay --relay edge-1
#   nomad var put nomad/jobs/relay certificate=@relay.pem key=@relay.key ca=@ztna-ca/ca.pem
#   nomad job run nomad/relay.nomad.hcl

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

variable "image_uid" {
  type        = number
  default     = 65532
  description = "With docker: the user and group of the image, to whom the certificate's key is given"
}

variable "command" {
  type        = string
  default     = "ztna-relay"
  description = "The console script: on PATH, or its full path"
}

variable "datacenters" {
  type        = list(string)
  default     = ["*"]
  description = "The datacenters it may run in"
}

variable "node_class" {
  type        = string
  default     = ""
  description = "The class of the clients it may run on; empty: any"
}

variable "name" {
  type        = string
  default     = "edge-1"
  description = "The relay's name, as in its certificate's relay.<name>.ztna"
}

variable "port" {
  type        = number
  default     = 4433
  description = "The static port of control connections, UDP and TCP"
}

variable "forwarder_port" {
  type        = number
  default     = 4434
  description = "The static port of the forwarder, UDP and TCP"
}

variable "resolver" {
  type        = string
  default     = "127.0.0.1:5533"
  description = "The dnsd it asks, on loopback: whoever answers DNS decides permission"
}

variable "domain" {
  type        = string
  default     = "ztna.local"
  description = "The zone of the services' names"
}

# Who the task runs as, and so owns the key: the image's user, `nobody` with exec, else whoever the client runs as.
locals {
  key_owner = var.driver == "docker" ? var.image_uid : var.driver == "exec" ? 65534 : -1
}

job "relay" {
  type        = "service"
  datacenters = var.datacenters

  dynamic "constraint" {
    for_each = var.node_class == "" ? [] : [var.node_class]

    content {
      attribute = "$${node.class}"
      value     = constraint.value
    }
  }

  # Its ports are static and agents know one address: an update stops the old one first. Relays that take turns are
  # jobs of other names, each with a name and a certificate of its own, updated one at a time (docs/relays.md).
  update {
    health_check      = "checks"
    min_healthy_time  = "5s"
    healthy_deadline  = "2m"
    progress_deadline = "5m"
    auto_revert       = true
  }

  group "relay" {
    network {
      port "control" {
        static = var.port
      }

      port "forwarder" {
        static = var.forwarder_port
      }

      port "admin" {}
    }

    service {
      name     = "ztna-relay"
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

    task "relay" {
      driver = var.driver

      # Above the drain (25 s by default). A client cuts it to its max_kill_timeout, which is 30 s unless it says more.
      kill_timeout = "30s"
      kill_signal  = "SIGTERM"

      # Where the image's health check asks; others have no use for it.
      env {
        READY_AT = "127.0.0.1:${NOMAD_PORT_admin}"
      }

      dynamic "config" {
        for_each = var.driver == "docker" ? [] : [var.command]

        content {
          command = config.value
          args    = ["--config", "${NOMAD_TASK_DIR}/relay.yaml"]
        }
      }

      dynamic "config" {
        for_each = var.driver == "docker" ? [var.command] : []

        content {
          image        = var.image
          command      = config.value
          args         = ["--config", "${NOMAD_TASK_DIR}/relay.yaml"]
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

      template {
        destination = "local/relay.yaml"
        data        = <<-YAML
          domain: ${var.domain}
          relay:
            name: ${var.name}
            tls:
              certificate: {{ env "NOMAD_SECRETS_DIR" }}/relay.pem
              key: {{ env "NOMAD_SECRETS_DIR" }}/relay.key
              ca: {{ env "NOMAD_SECRETS_DIR" }}/ca.pem
            listen: {{ env "NOMAD_ADDR_control" }}
            forwarder: {{ env "NOMAD_ADDR_forwarder" }}
            admin: 127.0.0.1:{{ env "NOMAD_PORT_admin" }}
            resolvers: ["${var.resolver}"]
        YAML
      }

      # A new certificate is taken up as its file changes, and nobody is disconnected: nothing to restart or signal.
      template {
        destination = "secrets/relay.pem"
        change_mode = "noop"
        data        = "{{ with nomadVar \"nomad/jobs/relay\" }}{{ .certificate }}{{ end }}"
      }

      template {
        destination = "secrets/relay.key"
        change_mode = "noop"
        perms       = "0600"
        uid         = local.key_owner
        gid         = local.key_owner
        data        = "{{ with nomadVar \"nomad/jobs/relay\" }}{{ .key }}{{ end }}"
      }

      template {
        destination = "secrets/ca.pem"
        change_mode = "noop"
        data        = "{{ with nomadVar \"nomad/jobs/relay\" }}{{ .ca }}{{ end }}"
      }

      resources {
        cpu    = 200
        memory = 256
      }
    }
  }
}
