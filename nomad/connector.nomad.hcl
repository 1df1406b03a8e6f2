# A connector of the host (a system job): it fronts every service of this host's Consul agent that is tagged `ztna`, that
# its certificate grants and that names no connector of its own. A job needs nothing but the tag then (plain.nomad.hcl).
#
#   ztna ca issue connector --connector plain-web --connector-id host
#   nomad var put nomad/jobs/connector certificate=@connector.pem key=@connector.key ca=@ztna-ca/ca.pem
#   nomad job run -var relay=10.0.0.1:4433 nomad/connector.nomad.hcl

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

variable "connector_id" {
  type        = string
  default     = "host"
  description = "The connector's name, as in its certificate's id.<name>.ztna; each host adds an instance to it"
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

# Who the task runs as, and so owns the key: the image's user, `nobody` with exec, else whoever the client runs as.
locals {
  key_owner = var.driver == "docker" ? var.image_uid : var.driver == "exec" ? 65534 : -1
}

job "connector" {
  type        = "system"
  datacenters = var.datacenters

  dynamic "constraint" {
    for_each = var.node_class == "" ? [] : [var.node_class]

    content {
      attribute = "$${node.class}"
      value     = constraint.value
    }
  }

  update {
    max_parallel     = 1
    health_check     = "checks"
    min_healthy_time = "5s"
  }

  group "connector" {
    network {
      port "link" {}
      port "admin" {}
    }

    service {
      name     = "ztna-connector"
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

    task "connector" {
      driver = var.driver

      # Above the drain (25 s by default) and a logout (3 s). A client cuts it to its max_kill_timeout, which is 30 s unless it says more.
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
          args    = ["connector", "--config", "${NOMAD_TASK_DIR}/connector.yaml"]
        }
      }

      dynamic "config" {
        for_each = var.driver == "docker" ? [var.command] : []

        content {
          image        = var.image
          command      = config.value
          args         = ["connector", "--config", "${NOMAD_TASK_DIR}/connector.yaml"]
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
        destination = "local/connector.yaml"
        data        = <<-YAML
          domain: ${var.domain}
          consul:
            address: ${var.consul}
            %{~if var.login_method != ""~}

            login:
              method: ${var.login_method}
              jwt_file: {{ env "NOMAD_SECRETS_DIR" }}/nomad_consul.jwt
            %{~endif~}

          connector:
            id: ${var.connector_id}--{{ env "NOMAD_SHORT_ALLOC_ID" }}
            tls:
              certificate: {{ env "NOMAD_SECRETS_DIR" }}/connector.pem
              key: {{ env "NOMAD_SECRETS_DIR" }}/connector.key
              ca: {{ env "NOMAD_SECRETS_DIR" }}/ca.pem
            relays:
              - address: ${var.relay}
                name: ${var.relay_name}
            consul_services: true
            link: {{ env "NOMAD_ADDR_link" }}
            link_advertise: {{ env "NOMAD_ADDR_link" }}
            admin: 127.0.0.1:{{ env "NOMAD_PORT_admin" }}
        YAML
      }

      # A new certificate is taken up as its file changes, and no flow ends: nothing to restart or signal.
      template {
        destination = "secrets/connector.pem"
        change_mode = "noop"
        data        = "{{ with nomadVar \"nomad/jobs/connector\" }}{{ .certificate }}{{ end }}"
      }

      template {
        destination = "secrets/connector.key"
        change_mode = "noop"
        perms       = "0600"
        uid         = local.key_owner
        gid         = local.key_owner
        data        = "{{ with nomadVar \"nomad/jobs/connector\" }}{{ .key }}{{ end }}"
      }

      template {
        destination = "secrets/ca.pem"
        change_mode = "noop"
        data        = "{{ with nomadVar \"nomad/jobs/connector\" }}{{ .ca }}{{ end }}"
      }

      resources {
        cpu    = 100
        memory = 128
      }
    }
  }
}
