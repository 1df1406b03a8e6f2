# An agent on every client (a system job): programs on the host reach services by name at their virtual addresses.
# What the host may use is in the certificate, which lies in a Nomad variable that only this job may read:
#
#   ztna ca issue agent --agent web-app
#   nomad var put nomad/jobs/agent certificate=@agent.pem key=@agent.key ca=@ztna-ca/ca.pem
#   nomad job run -var relay=10.0.0.1:4433 nomad/agent.nomad.hcl
#
# The modes anyip and tun change the host's network, so the agent has to be root there: raw_exec by a client that is,
# or docker by one whose plugin allows the two capabilities (`allow_caps`). With `exec` it is not.
# Mode listen needs no privileges, and a pool inside 127.0.0.0/8.

variable "driver" {
  type        = string
  default     = "raw_exec"
  description = "raw_exec, exec (mode listen) or docker"
}

variable "image" {
  type        = string
  default     = "ztna-mesh:0.1.0"
  description = "With docker: the image"
}

variable "command" {
  type        = string
  default     = "ztna-sidecar"
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

variable "mode" {
  type        = string
  default     = "anyip"
  description = "listen, anyip or tun (docs/agent-modes.md)"
}

variable "pool" {
  type        = string
  default     = "10.100.0.0/16"
  description = "The network of virtual addresses, the same as dnsd's"
}

variable "relay" {
  type        = string
  description = "host:port of the relay"
}

variable "relay_name" {
  type        = string
  default     = "edge-1"
  description = "The relay's name, as in its certificate's relay.<name>.ztna"
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

# Who the task runs as, and so owns the key: `nobody` with exec, root with docker, else whoever the client runs as.
locals {
  key_owner = var.driver == "exec" ? 65534 : -1
}

job "agent" {
  type        = "system"
  datacenters = var.datacenters

  dynamic "constraint" {
    for_each = var.node_class == "" ? [] : [var.node_class]

    content {
      attribute = "$${node.class}"
      value     = constraint.value
    }
  }

  # One host after the other: an agent that is replaced ends the flows of its host's programs.
  update {
    max_parallel     = 1
    health_check     = "checks"
    min_healthy_time = "5s"
  }

  group "agent" {
    network {
      port "admin" {}
    }

    service {
      name     = "ztna-agent"
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

    task "agent" {
      driver = var.driver
      user   = var.driver == "docker" ? "root" : ""

      # Above the drain (5 s by default): it undoes what it changed on the host before it ends.
      kill_timeout = "15s"
      kill_signal  = "SIGTERM"

      # Where the image's health check asks; others have no use for it.
      env {
        READY_AT = "127.0.0.1:${NOMAD_PORT_admin}"
      }

      dynamic "config" {
        for_each = var.driver == "docker" ? [] : [var.command]

        content {
          command = config.value
          args    = ["agent", "--config", "${NOMAD_TASK_DIR}/agent.yaml"]
        }
      }

      dynamic "config" {
        for_each = var.driver == "docker" ? [var.command] : []

        content {
          image        = var.image
          command      = config.value
          args         = ["agent", "--config", "${NOMAD_TASK_DIR}/agent.yaml"]
          network_mode = "host"
          devices      = var.mode == "tun" ? [{ host_path = "/dev/net/tun", container_path = "/dev/net/tun" }] : []

          # No capability but what its mode needs, and nothing of the image can be written to. In `listen` it may
          # listen at ports below 1024, too.
          cap_drop        = ["all"]
          cap_add         = var.mode == "listen" ? ["net_bind_service"] : ["net_admin", "net_raw"]
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
        destination = "local/agent.yaml"
        data        = <<-YAML
          domain: ${var.domain}
          consul:
            address: ${var.consul}
            %{~if var.login_method != ""~}

            login:
              method: ${var.login_method}
              jwt_file: {{ env "NOMAD_SECRETS_DIR" }}/nomad_consul.jwt
            %{~endif~}

          agent:
            tls:
              certificate: {{ env "NOMAD_SECRETS_DIR" }}/agent.pem
              key: {{ env "NOMAD_SECRETS_DIR" }}/agent.key
              ca: {{ env "NOMAD_SECRETS_DIR" }}/ca.pem
            relays:
              - address: ${var.relay}
                name: ${var.relay_name}
            mode: ${var.mode}
            pool: ${var.pool}
            admin: 127.0.0.1:{{ env "NOMAD_PORT_admin" }}
        YAML
      }

      # A new certificate is taken up as its file changes, and no flow ends: nothing to restart or signal.
      template {
        destination = "secrets/agent.pem"
        change_mode = "noop"
        data        = "{{ with nomadVar \"nomad/jobs/agent\" }}{{ .certificate }}{{ end }}"
      }

      template {
        destination = "secrets/agent.key"
        change_mode = "noop"
        perms       = "0600"
        uid         = local.key_owner
        gid         = local.key_owner
        data        = "{{ with nomadVar \"nomad/jobs/agent\" }}{{ .key }}{{ end }}"
      }

      template {
        destination = "secrets/ca.pem"
        change_mode = "noop"
        data        = "{{ with nomadVar \"nomad/jobs/agent\" }}{{ .ca }}{{ end }}"
      }

      resources {
        cpu    = 100
        memory = 128
      }
    }
  }
}
